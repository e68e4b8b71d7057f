import logging

import numpy as np
import pytest

from pipeline import child, imatrix
from pipeline import forecast as module
from pipeline.errors import CheckFailed, ConfigError
from pipeline.export import convert
from pipeline.extend import with_context
from pipeline.forecast import (
    DATASET,
    IMATRIX,
    Choice,
    Fallback,
    Forecast,
    forecasts_of,
    foretell,
    handle_fallbacks,
    require_foretold,
    stored_bytes,
)
from pipeline.gguf_file import GgufContents
from pipeline.quant_types import QUANT_TYPES

FALLBACK = Fallback("blk.0.ffn_up.weight", 576, 256, "Q2_K", "Q4_0")


@pytest.fixture(scope="module")
def f16(f16_of, toy_gpt2):
    return GgufContents(f16_of(toy_gpt2))


def made(f16, kind, tools, choice, folder):
    """What llama-quantize really makes of it."""
    if choice.importance:
        ones = {name: np.ones(int(tensor.shape[0])) for name, tensor in f16.matrices.items()}
        imatrix.write(folder / IMATRIX, ones, dict.fromkeys(ones, 1), chunk_size=1, dataset=DATASET)
    program = tools.program("llama-quantize")
    child.run([program, *choice.arguments(), f16.path, f"{kind}.gguf", kind, "1"], cwd=folder)
    return GgufContents(folder / f"{kind}.gguf")


@pytest.mark.parametrize(
    ("kind", "choice"),
    [
        ("Q2_K", Choice(False)),
        ("Q2_K", Choice(True)),
        ("Q2_K_S", Choice(True)),
        ("Q4_K_M", Choice(True)),
        ("Q2_K", Choice(True, {"blk.0.ffn_up.weight": "Q6_K", "token_embd.weight": "Q4_K"})),
    ],
    ids=str,
)
def test_types_and_size_are_foretold_to_the_byte(f16, llama_cpp, tmp_path, kind, choice):
    forecast = foretell(f16, kind, llama_cpp, choice)
    file = made(f16, kind, llama_cpp, choice, tmp_path)
    require_foretold(file, kind, forecast)
    assert forecast.size_bytes == file.path.stat().st_size
    assert choice.types.items() <= forecast.types.items()
    assert forecast.shapes == {name: tuple(tensor.shape.tolist()) for name, tensor in file.tensors.items()}
    assert forecast.fallbacks == ()


@pytest.mark.slow
@pytest.mark.parametrize("importance", [False, True])
def test_every_type_of_the_table_is_made_as_foretold(small_base, small_tools, llama_cpp, tmp_path, importance):
    convert(small_base, small_tools, "toy", tmp_path / "toy-F16.gguf")
    f16 = GgufContents(tmp_path / "toy-F16.gguf")
    for kind in (kind for kind, row in QUANT_TYPES.items() if importance or not row.needs_importance):
        if kind != "F16":
            forecast = foretell(f16, kind, llama_cpp, Choice(importance))
            require_foretold(made(f16, kind, llama_cpp, Choice(importance), tmp_path), kind, forecast)
            assert not forecast.fallbacks


def test_the_exported_file_is_its_own_forecast(f16, llama_cpp):
    forecast = foretell(f16, "F16", llama_cpp, Choice(True))
    assert forecast.size_bytes == f16.path.stat().st_size
    assert set(forecast.types.values()) == {"F16", "F32"}


def test_what_llama_quantize_is_told_names_no_folder():
    arguments = Choice(True, {"blk.0.ffn_up.weight": "Q3_K"}).arguments()
    assert arguments == ["--imatrix", IMATRIX, "--tensor-type", r"^blk\.0\.ffn_up\.weight$=Q3_K"]
    assert Choice(False).arguments() == [] and Choice(False).header_bytes() == 0


def test_a_type_for_one_tensor_is_not_given_to_those_whose_names_begin_with_its_own(f16, llama_cpp):
    choice = Choice(False, {"blk.1.attn_output.weight": "Q8_0"})
    types = foretell(f16, "Q2_K", llama_cpp, choice).types
    assert [name for name, kind in types.items() if kind == "Q8_0"] == ["blk.1.attn_output.weight"]


@pytest.mark.parametrize("kept", [0, 5])
def test_a_dry_run_that_speaks_of_other_tensors_is_not_believed(f16, llama_cpp, monkeypatch, kept):
    run = child.run

    def shortened(*args, **more):
        said = run(*args, **more)
        lines = said.stderr.splitlines(keepends=True)
        told = [line for line in lines if module.FORETOLD.search(line)]
        return said._replace(stderr="".join(told[:kept]))

    monkeypatch.setattr(module.child, "run", shortened)
    with pytest.raises(CheckFailed, match=rf"dry run speaks of {kept} tensors, but toy-F16\.gguf has 28; run scripts"):
        foretell(f16, "Q2_K", llama_cpp, Choice(False))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("type", r"toy-F16\.gguf is not what .*: blk\.0\.ffn_up\.weight is F16, foretold was Q2_K"),
        ("missing", r"blk\.0\.ffn_up\.weight is F16, foretold was None"),
        ("more", r"extra is None, foretold was F32"),
        ("size", r"size in bytes is \d+, foretold was 1;"),
        ("kind", r"file type is 1, foretold was 10"),
    ],
)
def test_a_file_that_is_not_what_was_foretold_is_refused_by_what_differs(f16, llama_cpp, what, message):
    right = foretell(f16, "F16", llama_cpp, Choice(False))
    require_foretold(f16, "F16", right)
    types = dict(right.types)
    if what == "type":
        types["blk.0.ffn_up.weight"] = "Q2_K"
    if what == "missing":
        del types["blk.0.ffn_up.weight"]
    if what == "more":
        types["extra"] = "F32"
    wrong = Forecast(1 if what == "size" else right.size_bytes, types, ())
    with pytest.raises(CheckFailed, match=message):
        require_foretold(f16, "Q2_K" if what == "kind" else "F16", wrong)


def test_a_fallback_is_a_warning_or_an_error_as_asked(caplog):
    handle_fallbacks("Q2_K", [], "error")
    with caplog.at_level(logging.WARNING):
        handle_fallbacks("Q2_K", [FALLBACK], "warn")
    assert "1 matrices cannot be stored as Q2_K wants: blk.0.ffn_up.weight would get Q4_0 instead of" in caplog.text
    with pytest.raises(ConfigError, match=r"rows of 576 weights are not a multiple of 256; choose Q8_0"):
        handle_fallbacks("Q2_K", [FALLBACK], "error")


@pytest.mark.parametrize(
    ("shape", "kind", "size"),
    [((256,), "F32", 1024), ((256, 3), "Q2_K", 256), ((9,), "F32", 64), ((256, 2), "Q6_K", 448)],
)
def test_bytes_of_a_tensor_count_its_padding(shape, kind, size):
    assert stored_bytes(shape, kind) == size


def test_the_base_model_tells_the_size_of_a_tuned_one_that_will_have_more_positions(toy_gpt2, llama_cpp, tmp_path):
    foreseen = forecasts_of(toy_gpt2, ("F16", "Q2_K"), llama_cpp, name="toy", importance=True, context=2048)
    path = tmp_path / "toy-F16.gguf"
    convert(with_context(toy_gpt2, 2048, tmp_path / "model"), llama_cpp, "toy", path, f16_positions=True)
    assert foreseen["F16"].size_bytes == path.stat().st_size
    require_foretold(made(GgufContents(path), "Q2_K", llama_cpp, Choice(True), tmp_path), "Q2_K", foreseen["Q2_K"])
    assert foreseen["Q2_K"].types["position_embd.weight"] == "F16"
