import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from pipeline.errors import CheckFailed
from pipeline.gguf_file import CHUNK_WEIGHTS, GgufContents


def write(path, tensors):
    """A GGUF of float32 arrays stored as the named types."""
    writer = GGUFWriter(path, "gpt2")
    writer.add_context_length(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, (values, kind) in tensors.items():
        kind = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def half_zero(rows, columns):
    values = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    values[:, ::2] = 0
    return values


def test_bits_zeros_and_types_are_those_of_the_bytes(tmp_path):
    path = write(
        tmp_path / "a.gguf",
        {
            "token_embd.weight": (half_zero(2, 64), "F16"),
            "blk.0.ffn_up.weight": (half_zero(4, 64), "Q8_0"),
            "blk.0.ffn_down.weight": (np.ones((4, 64), np.float32), "F16"),
            "blk.0.attn_norm.weight": (np.zeros(64, np.float32), "F32"),
        },
    )
    facts = GgufContents(path).describe()
    assert facts["zeros_by_tensor"] == {"blk.0.ffn_up.weight": 0.5, "blk.0.ffn_down.weight": 0.0}
    assert facts["zeros_by_type"] == {"F16": 0.0, "Q8_0": 0.5}
    assert facts["zeros"] == 0.25  # neither the embedding nor the norm counts
    assert facts["tensor_types"] == {"F16": 2, "Q8_0": 1, "F32": 1}
    assert facts["matrix_types"] == {"token_embd": {"F16": 1}, "ffn_up": {"Q8_0": 1}, "ffn_down": {"F16": 1}}
    weights = {"F16": 2 * 64 + 4 * 64, "Q8_0": 4 * 64, "F32": 64}
    bits = 16 * weights["F16"] + 8.5 * weights["Q8_0"] + 32 * weights["F32"]
    assert facts["bits_per_weight"] == pytest.approx(bits / sum(weights.values()))


def test_zeros_are_counted_across_chunks(tmp_path):
    columns = 1024
    rows = CHUNK_WEIGHTS // columns + 3
    path = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (half_zero(rows, columns), "F16")})
    assert GgufContents(path).describe()["zeros"] == 0.5


def test_metadata_loses_the_architectures_prefix_and_leaves_out_lists(tmp_path):
    path = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (half_zero(4, 64), "F16")})
    metadata = GgufContents(path).metadata
    assert metadata["context_length"] == 64
    assert metadata["general.architecture"] == "gpt2"
    assert "tokenizer.ggml.tokens" not in metadata


def test_a_matrix_that_is_not_finite_is_refused_by_name(tmp_path):
    values = half_zero(4, 64)
    values[1, 1] = np.nan
    path = write(tmp_path / "a.gguf", {"blk.7.ffn_up.weight": (values, "F16")})
    with pytest.raises(CheckFailed, match=r"blk\.7\.ffn_up\.weight"):
        GgufContents(path).describe()


def test_a_file_cut_short_is_refused(tmp_path):
    path = write(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (half_zero(4, 64), "F16")})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckFailed, match=r"a\.gguf is not a whole GGUF file"):
        GgufContents(path)
