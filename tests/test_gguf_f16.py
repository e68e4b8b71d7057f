import shutil

import numpy as np
import pytest
from gguf import GGUFReader

from pipeline.export import convert
from pipeline.gguf_f16 import store_as_f16
from pipeline.gguf_file import GgufContents
from scripts.make_random_gpt2 import make


@pytest.fixture(scope="module")
def gguf(gpt2_vocab, llama_cpp, tmp_path_factory):
    """An odd width, so that tensors need padding."""
    folder = tmp_path_factory.mktemp("f16")
    convert(make(folder / "m", gpt2_vocab, layers=1, width=9, heads=3, positions=5), llama_cpp, "x", folder / "x.gguf")
    return folder / "x.gguf"


@pytest.fixture
def copy(gguf, tmp_path):
    return shutil.copy(gguf, tmp_path / "copy.gguf")


@pytest.mark.parametrize("name", ["position_embd.weight", "blk.0.attn_norm.bias", "output_norm.weight"])
def test_one_tensor_is_rounded_and_nothing_else_changes(gguf, copy, name):
    store_as_f16(copy, name)
    before, after = GgufContents(gguf), GgufContents(copy)
    assert after.metadata == before.metadata
    start = GGUFReader(gguf).data_offset
    assert GGUFReader(copy).data_offset == start
    assert list(after.tensors) == list(before.tensors)
    for key, tensor in before.tensors.items():
        expected = tensor.data.astype(np.float16) if key == name else tensor.data
        assert after.tensors[key].data.dtype == expected.dtype
        assert np.array_equal(after.tensors[key].data, expected)
        assert (after.tensors[key].data_offset - start) % 32 == 0
    assert copy.stat().st_size < gguf.stat().st_size
    assert [path.name for path in copy.parent.iterdir()] == ["copy.gguf"]


def test_the_words_of_the_vocabulary_stay(gguf, copy):
    store_as_f16(copy, "position_embd.weight")
    before, after = (GGUFReader(path).fields["tokenizer.ggml.tokens"].contents() for path in (gguf, copy))
    assert before == after and len(after) == 50257


def test_a_value_beyond_f16_becomes_infinite_for_the_proof_to_find(copy):
    tensor = next(t for t in GGUFReader(copy, "r+").tensors if t.name == "position_embd.weight")
    tensor.data[2, 3] = 1e6
    tensor.data.flush()
    store_as_f16(copy, "position_embd.weight")
    assert np.isinf(GgufContents(copy).tensors["position_embd.weight"].data[2, 3])
