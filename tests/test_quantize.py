import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from pipeline import child, imatrix
from pipeline import quantize as stage
from pipeline.artifacts import Checkpoint, GgufFile, sha256_of
from pipeline.config import QuantizeConfig
from pipeline.distill import Recipe, validate
from pipeline.errors import CheckFailed, ConfigError, MachineError
from pipeline.export import convert
from pipeline.forecast import IMATRIX, Forecast, foretell
from pipeline.gguf_file import GgufContents
from pipeline.gguf_reader import TensorReader
from pipeline.gguf_weights import load_weights
from pipeline.kquants import KTYPES
from pipeline.quant_types import check_types
from pipeline.quantize import quantize
from scripts.make_random_gpt2 import make
from tests.calibrated import calibration_in
from tests.small_gpt2 import make_model
from tests.test_recover import half_zero

SEQUENCES = [[257, *range(n, n + 12), 257] for n in range(0, 240, 8)]
STOCK = QuantizeConfig(encoder="llama.cpp")


def given(checkpoint, tools, folder):
    """What the stage takes: the exported file, the checkpoint behind it, calibration text."""
    path = folder / "toy-F16.gguf"
    convert(checkpoint, tools, "toy", path)
    f16 = GgufFile(path, sha256_of(path), path.stat().st_size, "F16", GgufContents(path).describe())
    return SimpleNamespace(f16=f16, model=Checkpoint.of(checkpoint, {}), text=calibration_in(folder, SEQUENCES))


def run(model, tools, out, cfg, keep_zeros=False, tuned=None, adapting=False):
    out.mkdir(exist_ok=True)
    more = {"keep_zeros": keep_zeros, "adapting": adapting, "tools": tools, "device": "cpu", "name": "toy", "out": out}
    return quantize(model.f16, model.model, tuned or model.model, model.text, cfg, **more).files


@pytest.fixture(scope="module")
def toy(small_base, small_tools, tmp_path_factory):
    """Half zero, and with block matrices so large that rounding them shows in the predictions."""
    folder = tmp_path_factory.mktemp("toy")
    model = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".h." in name and parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder / "tuned")
    half_zero(model).save_pretrained(folder / "model")
    Checkpoint(small_base, "").copy_tokenizer(folder / "model")
    return given(folder / "model", small_tools, folder)


@pytest.fixture(scope="module")
def narrow(small_tools, tmp_path_factory):
    """Like SmolLM2: rows of 192 weights are no multiple of 256, those of ffn_down are."""
    folder = tmp_path_factory.mktemp("narrow")
    return given(make_model(folder / "model", width=192), small_tools, folder)


@pytest.fixture(scope="module")
def ours(toy, llama_cpp, tmp_path_factory):
    """The default: Q2_K, importance matrix, our encoder."""
    return run(toy, llama_cpp, tmp_path_factory.mktemp("ours"), QuantizeConfig())[0]


@pytest.fixture(scope="module")
def theirs(toy, llama_cpp, tmp_path_factory):
    """The same by llama-quantize alone."""
    return run(toy, llama_cpp, tmp_path_factory.mktemp("theirs"), STOCK)[0]


def test_q2_k_is_the_mixture_that_it_is_without_fallback(ours):
    assert ours.path.name == "toy-Q2_K.gguf"
    assert ours.facts["matrix_types"] == {
        "attn_output": {"Q3_K": 1},
        "attn_qkv": {"Q3_K": 1},
        "ffn_down": {"Q3_K": 1},
        "ffn_up": {"Q2_K": 1},
        "position_embd": {"F32": 1},
        "token_embd": {"Q6_K": 1},
    }
    assert ours.facts["fallbacks"] == [] and ours.facts["encoder"] == "gptq"
    assert ours.facts["encoded_tensors"] == 5 and ours.facts["importance"] is True
    assert ours.size_bytes == ours.path.stat().st_size == ours.facts["predicted_bytes"]
    assert ours.sha256 == sha256_of(ours.path)


def test_our_file_has_llama_quantizes_layout_byte_for_byte_and_other_codes_in_it(ours, theirs):
    assert ours.size_bytes == theirs.size_bytes
    one, other = GgufContents(ours.path), GgufContents(theirs.path)
    assert ours.path.read_bytes()[: one.header_bytes] == theirs.path.read_bytes()[: other.header_bytes]
    assert changed(ours, theirs) == {name for name, tensor in one.tensors.items() if tensor.tensor_type.name in KTYPES}


def changed(file, other):
    one, two = (GgufContents(each.path).tensors for each in (file, other))
    return {name for name, tensor in one.items() if not np.array_equal(tensor.data, two[name].data)}


def test_what_will_be_adapted_is_left_as_llama_quantize_has_it(theirs, toy, llama_cpp, tmp_path):
    file = run(toy, llama_cpp, tmp_path, QuantizeConfig(), adapting=True)[0]
    assert changed(file, theirs) == {"blk.0.ffn_up.weight", "token_embd.weight"}
    assert file.facts["encoded_tensors"] == 2 and file.size_bytes == theirs.size_bytes


def test_nothing_is_left_where_every_type_keeps_its_zeros(toy, llama_cpp, tmp_path):
    cfg = QuantizeConfig(types=("Q3_K_S",))
    one, other = (
        run(toy, llama_cpp, tmp_path / name, cfg, adapting=adapting)[0]
        for name, adapting in (("one", True), ("other", False))
    )
    assert one.facts["encoded_tensors"] == other.facts["encoded_tensors"] == 5
    assert one.sha256 == other.sha256


def test_our_file_predicts_more_like_the_model_than_llama_quantizes(ours, theirs, toy):
    whole, rounded = (AutoModelForCausalLM.from_pretrained(toy.model.path, dtype=torch.float32) for _ in range(2))
    recipe = Recipe(1, 256, 1e-4, 1, "fp32", 0)
    costs = []
    for file in (ours, theirs):
        load_weights(rounded, file.path)
        costs.append(validate(rounded.eval(), whole.eval(), SEQUENCES, recipe))
    assert costs[0] < 0.9 * costs[1]


def test_types_without_zeros_are_rounded_from_the_tuned_weights_and_come_nearer_to_them(ours, toy, llama_cpp, tmp_path):
    tuned = Checkpoint(toy.model.path.parent / "tuned", "")
    file = run(toy, llama_cpp, tmp_path, QuantizeConfig(), tuned=tuned)[0]
    assert file.facts["unpruned_tensors"] == 1 and file.size_bytes == ours.size_bytes
    assert abs(file.facts["zeros"] - ours.facts["zeros"]) < 0.05
    whole, rounded = (AutoModelForCausalLM.from_pretrained(tuned.path, dtype=torch.float32).eval() for _ in range(2))
    costs = []
    for each in (file, ours):
        load_weights(rounded, each.path)
        costs.append(validate(rounded, whole, SEQUENCES, Recipe(1, 256, 1e-4, 1, "fp32", 0)))
    assert costs[0] < 0.97 * costs[1]  # one of four matrices


def test_pruned_weights_stay_zero_in_symmetric_types_and_are_counted(ours):
    for name, share in ours.facts["zeros_by_tensor"].items():
        assert share > 0.4999 if GgufContents(ours.path).tensors[name].tensor_type.name == "Q3_K" else share < 0.4
    assert 0.3 < ours.facts["zeros"] < 0.5


@pytest.mark.slow
def test_zeros_that_are_kept_are_exact_in_every_type(toy, llama_cpp, tmp_path):
    (file,) = run(toy, llama_cpp, tmp_path, QuantizeConfig(), keep_zeros=True)
    assert file.facts["keep_zeros"] is True and file.facts["zeros"] > 0.4999
    cost = file.facts["zeros_cost"]
    assert 0 < cost["kl_free"] < cost["kl_kept"] < 100 * cost["kl_free"]
    assert {path.name for path in tmp_path.glob("*.gguf")} == {"toy-Q2_K.gguf", IMATRIX}
    before, after = GgufContents(toy.f16.path).matrices, GgufContents(file.path).matrices
    for name, tensor in before.items():
        stored = dequantize(after[name].data, after[name].tensor_type)
        assert not stored[tensor.data == 0].any(), name


def test_a_type_that_loses_zeros_is_refused_where_they_are_to_be_kept(toy, llama_cpp, tmp_path):
    with pytest.raises(ConfigError, match=r"but Q4_K_M stores blk\.0\.\w+\.weight as Q[45]_K; choose"):
        run(toy, llama_cpp, tmp_path, QuantizeConfig(types=("Q4_K_M",)), keep_zeros=True)
    assert not list(tmp_path.glob("*.gguf"))


def test_zeros_that_were_lost_after_all_are_a_failed_check(toy, llama_cpp, tmp_path):
    with pytest.raises(CheckFailed, match=r"\d+ pruned weights of \S+ in toy-Q2_K\.gguf have a value again"):
        run(toy, llama_cpp, tmp_path, STOCK, keep_zeros=True)


def test_the_file_does_not_tell_where_it_was_made(ours, toy):
    contents = GgufContents(ours.path)
    found = {key: value for key, value in contents.metadata.items() if key.startswith("quantize.")}
    assert found == {
        "quantize.imatrix.file": IMATRIX,
        "quantize.imatrix.dataset": "calibration.jsonl",
        "quantize.imatrix.entries_count": 5,
        "quantize.imatrix.chunks_count": found["quantize.imatrix.chunks_count"],
    }
    header = ours.path.read_bytes()[: contents.header_bytes]
    assert str(ours.path.parent).encode() not in header and str(toy.f16.path.parent).encode() not in header


def test_the_importance_matrix_is_that_of_the_calibration_text(ours, toy):
    found = imatrix.read(ours.path.parent / IMATRIX)
    assert found.keys() == GgufContents(ours.path).matrices.keys() | {"token_embd.weight"}
    model = AutoModelForCausalLM.from_pretrained(toy.model.path, dtype=torch.float32).eval()
    inputs = []
    model.transformer.h[0].mlp.c_fc.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for ids in SEQUENCES[len(SEQUENCES) // 10 :]:  # the first tenth is for validation
            model(torch.tensor([ids]))
    expected = torch.cat(inputs).square().mean(0)
    assert torch.allclose(torch.from_numpy(found["blk.0.ffn_up.weight"]), expected, rtol=0.05)  # bf16, where there is


def test_llama_quantize_alone_makes_the_file_it_makes_by_hand(theirs, toy, llama_cpp):
    assert theirs.facts["encoder"] == "llama.cpp" and theirs.facts["encoded_tensors"] == 0
    program = llama_cpp.program("llama-quantize")
    child.run([program, "--imatrix", IMATRIX, toy.f16.path, "by-hand.gguf", "Q2_K", "1"], cwd=theirs.path.parent)
    assert sha256_of(theirs.path.parent / "by-hand.gguf") == theirs.sha256


def test_without_an_importance_matrix_none_is_named_in_the_file(toy, theirs, llama_cpp, tmp_path):
    (file,) = run(toy, llama_cpp, tmp_path, QuantizeConfig(encoder="llama.cpp", importance=False))
    assert [path.name for path in tmp_path.iterdir()] == ["toy-Q2_K.gguf"]
    assert not [key for key in GgufContents(file.path).metadata if key.startswith("quantize.imatrix")]
    assert file.size_bytes < theirs.size_bytes and file.facts["importance"] is False
    assert file.size_bytes == file.facts["predicted_bytes"]


def test_several_types_come_in_the_order_asked_and_f16_is_the_exported_file(toy, llama_cpp, tmp_path):
    files = run(toy, llama_cpp, tmp_path, QuantizeConfig(types=("Q8_0", "F16", "Q4_K_M"), encoder="llama.cpp"))
    assert [file.type for file in files] == ["Q8_0", "F16", "Q4_K_M"]
    assert files[1].sha256 == toy.f16.sha256 and files[1].path.name == "toy-F16.gguf"
    assert all(file.size_bytes == file.facts["predicted_bytes"] for file in files)
    assert files[0].facts["bits_per_weight"] < files[1].facts["bits_per_weight"]


def test_f16_is_not_encoded(toy, llama_cpp, tmp_path):
    (file,) = run(toy, llama_cpp, tmp_path, QuantizeConfig(types=("F16",), importance=False))
    assert file.sha256 == toy.f16.sha256 and file.facts["encoded_tensors"] == 0


def test_rows_that_do_not_divide_fall_back_and_are_reported_by_name(narrow, llama_cpp, tmp_path):
    """What does divide is encoded, on the activations of what was stored in other types before it."""
    (file,) = run(narrow, llama_cpp, tmp_path, QuantizeConfig())
    assert {"tensor": "blk.0.ffn_up.weight", "row": 192, "block": 256, "asked": "Q2_K", "got": "Q4_0"} in (
        file.facts["fallbacks"]
    )
    stored = GgufContents(file.path).tensors
    for fallback in file.facts["fallbacks"]:
        assert stored[fallback["tensor"]].tensor_type.name == fallback["got"]
        assert stored[fallback["tensor"]].shape[0] % 256
    kept = {name for name, tensor in stored.items() if tensor.shape[0] % 256 == 0 and name.endswith("down.weight")}
    assert kept and not kept & {fallback["tensor"] for fallback in file.facts["fallbacks"]}
    assert file.facts["encoded_tensors"] == len(kept)


def test_a_fallback_is_refused_before_anything_is_written_if_asked(narrow, llama_cpp, tmp_path):
    with pytest.raises(ConfigError, match=r"blk\.0\.\w+\.weight would get Q4_0 .* rows of 192 .* multiple of 256"):
        run(narrow, llama_cpp, tmp_path, QuantizeConfig(types=("Q8_0", "Q2_K"), fallback="error"))
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_refused_before_anything_is_written(toy, llama_cpp, tmp_path, monkeypatch):
    usage = stage.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(MachineError, match=r"need \d+\.\d MB, but the disk .* has 0\.1 MB left"):
        run(toy, llama_cpp, tmp_path, QuantizeConfig())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_what_was_foretold_is_refused(toy, llama_cpp, tmp_path, monkeypatch):
    def otherwise(*args):
        forecast = foretell(*args)
        return Forecast(forecast.size_bytes, forecast.types | {"blk.0.ffn_up.weight": "Q3_K"}, forecast.fallbacks)

    monkeypatch.setattr(stage, "foretell", otherwise)
    with pytest.raises(CheckFailed, match=r"blk\.0\.ffn_up\.weight is Q2_K, foretold was Q3_K"):
        run(toy, llama_cpp, tmp_path, STOCK)


def test_weights_that_are_no_numbers_are_refused(toy, llama_cpp, tmp_path):
    path = tmp_path / "toy-F16.gguf"
    path.write_bytes(toy.f16.path.read_bytes())
    tensor = next(t for t in TensorReader(path, "r+").tensors if t.name == "blk.0.ffn_up.weight")
    tensor.data[0, 0] = float("nan")
    tensor.data.flush()
    bad = SimpleNamespace(f16=GgufFile(path, "", 0, "F16"), model=toy.model, text=toy.text)
    with pytest.raises(CheckFailed, match=re.escape("llama-quantize failed")):
        run(bad, llama_cpp, tmp_path / "out", STOCK)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (("Q2_k",), "Q2_k is unknown; did you mean Q2_K"),
        (("nonsense",), r"nonsense is unknown; Known are IQ1_S, .*Q8_0"),
        (("IQ2_XXS",), "IQ2_XXS needs an importance matrix"),
        (("Q2_K", "Q2_K"), "twice"),
    ],
)
def test_impossible_types_are_refused_by_name(types, message):
    with pytest.raises(ConfigError, match=message):
        check_types(types, importance=False)


def test_a_type_that_needs_an_importance_matrix_is_allowed_where_one_is_made():
    check_types(("Q2_K", "IQ2_XXS"), importance=True)


@pytest.mark.slow
def test_gpt2s_shape_is_70_7_mb_as_q2_k(gpt2_vocab, llama_cpp, tmp_path):
    gpt2 = given(make(tmp_path / "model", gpt2_vocab), llama_cpp, tmp_path)
    (file,) = run(gpt2, llama_cpp, tmp_path / "out", QuantizeConfig(fallback="error", encoder="llama.cpp"))
    assert (file.facts["tensors"], file.facts["matrices"]) == (148, 48)
    assert round(file.size_bytes / 1e6, 1) == 70.7
    assert round(file.facts["bits_per_weight"], 2) == 4.43
