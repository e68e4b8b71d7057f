import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoTokenizer

from pipeline import child, imatrix
from pipeline.errors import CheckFailed
from pipeline.export import convert
from pipeline.gguf_file import GgufContents
from pipeline.gguf_names import matrix_names
from pipeline.gguf_proof import rounded_model
from pipeline.matrices import block_matrices
from tests.exported import QUOTES

CHUNK = 64  # tokens of one sequence
TEXT = "\n".join(QUOTES[:3] + QUOTES[5:])  # without markup, which llama-imatrix's tokenizer may take for a token
# llama.cpp rounds to F16 what goes into a matrix, and keys and values, and looks GELU up in a table of F16: 2^-11
# relative each time, less in the mean of hundreds of squares, most in columns that are nearly always zero. Measured:
# 0.0032 in the worst column, 0.0002 in the median one; one wrong token of the 576 makes that 0.0007 at least.
WORST_COLUMN, MEDIAN_COLUMN = 0.01, 0.0005


@pytest.fixture(scope="module", params=["toy_gpt2", "standin"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def f16(checkpoint, llama_cpp, tmp_path_factory):
    path = tmp_path_factory.mktemp("f16") / "model-F16.gguf"
    convert(checkpoint, llama_cpp, "model", path)
    return GgufContents(path)


@pytest.fixture(scope="module")
def ours(f16, checkpoint, tmp_path_factory):
    """Written from a pass of the same model in torch."""
    sums, count = squared_inputs(rounded_model(f16, checkpoint), sequences(checkpoint))
    path = tmp_path_factory.mktemp("ours") / "imatrix.gguf"
    imatrix.write(path, sums, dict.fromkeys(sums, count), chunk_size=CHUNK, dataset="quotes.txt")
    return path


@pytest.fixture(scope="module")
def theirs(f16, llama_cpp, tmp_path_factory):
    """Written by llama-imatrix."""
    program, folder = llama_cpp.program("llama-imatrix"), tmp_path_factory.mktemp("theirs")
    if not program.is_file():
        pytest.skip("the build has no llama-imatrix; run scripts/build_llama_cpp.sh")
    (folder / "quotes.txt").write_text(TEXT)
    path = folder / "imatrix.gguf"
    command = [program, "-m", f16.path, "-f", folder / "quotes.txt", "-o", path, "-c", str(CHUNK), "-b", str(CHUNK)]
    child.run([*command, "--no-ppl", "-t", "1"])
    return path


def sequences(checkpoint):
    """TEXT as llama-imatrix reads it: cut into whole chunks, the first token of each replaced by the begin token."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    begin = tokenizer.bos_token_id
    ids = [begin, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    return [[begin, *ids[i + 1 : i + CHUNK]] for i in range(0, len(ids) - CHUNK + 1, CHUNK)]


def squared_inputs(model, chunks):
    """GGUF tensor to the squared inputs of its columns, summed over all tokens; and how many tokens."""
    matrices = block_matrices(model)
    names = matrix_names(model.config, matrices)
    sums = {}

    def add(name):
        def hook(module, inputs):
            sums[name] = sums.get(name, 0) + inputs[0].double().square().sum((0, 1)).numpy()

        return hook

    for name, module in matrices.items():
        module.register_forward_pre_hook(add(names[name]))
    with torch.inference_mode():
        model(torch.tensor(chunks))
    return sums, sum(len(chunk) for chunk in chunks)


def test_it_agrees_with_llama_imatrix_on_the_same_tokens(ours, theirs, f16):
    found, needed = imatrix.read(ours), imatrix.read(theirs)
    assert found.keys() == needed.keys() == f16.matrices.keys()
    for name, means in needed.items():
        difference = np.abs(found[name] / means - 1)
        assert difference.max() < WORST_COLUMN, name
        assert np.median(difference) < MEDIAN_COLUMN, name


def test_the_file_is_laid_out_as_llama_imatrix_lays_it_out(ours, theirs):
    one, other = GGUFReader(ours), GGUFReader(theirs)
    for reader in (one, other):
        assert reader.fields["imatrix.datasets"].contents()[0].endswith("quotes.txt")
    assert headers(one) == headers(other)
    assert [(t.name, t.shape.tolist(), t.tensor_type) for t in one.tensors] == [
        (t.name, t.shape.tolist(), t.tensor_type) for t in other.tensors
    ]
    assert [t.data.tolist() for t in one.tensors if t.name.endswith(".counts")] == [
        t.data.tolist() for t in other.tensors if t.name.endswith(".counts")
    ]


def headers(reader):
    return {
        key: (field.types, field.contents() if key != "imatrix.datasets" else None)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.kv_count")
    }


def quantized(f16, kind, tools, folder, *options):
    path = folder / f"{kind}{len(options)}.gguf"
    child.run([tools.program("llama-quantize"), *options, f16.path, path, kind, "1"])
    return GgufContents(path)


def weighted_error(f16, stored, importance):
    """Of all block matrices: squared error of a weight times the mean square of its input."""
    return sum(
        float((importance[name] * np.square(tensor.data.astype(np.float32) - weights(stored, name))).sum())
        for name, tensor in f16.matrices.items()
    )


def weights(contents, name):
    return dequantize(contents.tensors[name].data, contents.tensors[name].tensor_type)


def test_llama_quantize_takes_it_and_its_weighted_error_falls(f16, ours, llama_cpp, tmp_path):
    plain = quantized(f16, "Q2_K", llama_cpp, tmp_path)
    weighted = quantized(f16, "Q2_K", llama_cpp, tmp_path, "--imatrix", ours)
    assert weighted.metadata["quantize.imatrix.entries_count"] == len(f16.matrices)
    assert weighted.metadata["quantize.imatrix.dataset"] == "quotes.txt"
    importance = imatrix.read(ours)
    assert weighted_error(f16, weighted, importance) < weighted_error(f16, plain, importance)


@pytest.mark.parametrize("kind", [pytest.param("IQ2_XS", marks=pytest.mark.slow), "Q2_K_S"])
def test_types_that_need_it_are_made_with_it_and_refused_without(f16, ours, llama_cpp, tmp_path, kind):
    with pytest.raises(CheckFailed, match=r"llama-quantize failed .* failed to quantize model"):
        quantized(f16, kind, llama_cpp, tmp_path)
    stored = quantized(f16, kind, llama_cpp, tmp_path, "--imatrix", ours)
    assert all(np.isfinite(weights(stored, name)).all() for name in stored.matrices)


def test_inputs_that_were_always_zero_leave_a_file_of_numbers(f16, llama_cpp, tmp_path):
    """A sixteenth of a block, a whole one, a whole matrix: llama-quantize then divides by sums of no weights."""
    sums = {name: np.ones(int(tensor.shape[0])) for name, tensor in f16.matrices.items()}
    for name, dead in {"attn_qkv": slice(16, 32), "ffn_up": slice(256), "ffn_down": slice(None)}.items():
        sums[f"blk.0.{name}.weight"][dead] = 0
    imatrix.write(tmp_path / "i.gguf", sums, dict.fromkeys(sums, 1), chunk_size=1, dataset="d")
    stored = quantized(f16, "Q2_K", llama_cpp, tmp_path, "--imatrix", tmp_path / "i.gguf")
    assert all(np.isfinite(weights(stored, name)).all() for name in stored.matrices)


def test_what_is_written_is_read_back_as_means(tmp_path):
    sums = {"blk.1.ffn_up.weight": np.array([8.0, 0.0, 2.0]), "blk.0.ffn_down.weight": np.array([3.0, 6.0])}
    counts = {"blk.1.ffn_up.weight": 4, "blk.0.ffn_down.weight": 3}
    imatrix.write(tmp_path / "i.gguf", sums, counts, chunk_size=2, dataset="d")
    found = imatrix.read(tmp_path / "i.gguf")
    assert {name: means.tolist() for name, means in found.items()} == {
        "blk.0.ffn_down.weight": [1, 2],
        "blk.1.ffn_up.weight": [2, 0, 0.5],
    }


def test_the_same_sums_give_the_same_bytes_in_any_order(tmp_path):
    sums = {"b": np.array([1.0]), "a": np.array([2.0])}
    for name, given in (("one", sums), ("two", dict(reversed(sums.items())))):
        imatrix.write(tmp_path / name, given, {"a": 1, "b": 1}, chunk_size=1, dataset="d")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("value", "count"), [(float("nan"), 1), (float("inf"), 1), (1e39, 1), (-1.0, 1), (1.0, 0)], ids=str
)
def test_sums_that_cannot_be_are_refused_by_name(tmp_path, value, count):
    with pytest.raises(CheckFailed, match=rf"squared inputs of blk\.0\.ffn_up\.weight, summed over {count} tokens"):
        imatrix.write(
            tmp_path / "i.gguf", {"blk.0.ffn_up.weight": np.array([1.0, value])}, {"blk.0.ffn_up.weight": count},
            chunk_size=1, dataset="d",
        )  # fmt: skip
    assert not (tmp_path / "i.gguf").exists()


@pytest.mark.parametrize("counts", [{}, {"b": 1}])
def test_sums_without_their_counts_are_refused(tmp_path, counts):
    with pytest.raises(CheckFailed, match="sums and counts of the same tensors"):
        imatrix.write(tmp_path / "i.gguf", {"a": np.array([1.0])}, counts, chunk_size=1, dataset="d")


def test_a_model_is_not_read_as_an_importance_matrix(f16):
    with pytest.raises(CheckFailed, match=r"is not an importance matrix: its general\.type is not imatrix"):
        imatrix.read(f16.path)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "i.gguf"
    imatrix.write(path, {"a": np.ones(4096)}, {"a": 1}, chunk_size=1, dataset="d")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckFailed, match="is not a whole GGUF file"):
        imatrix.read(path)
