import re

import pytest
from gguf import GGUFReader

from pipeline import quantize as stage
from pipeline.artifacts import GgufFile, sha256_of
from pipeline.config import QuantizeConfig
from pipeline.errors import CheckFailed, ConfigError, MachineError
from pipeline.export import convert
from pipeline.extend import with_context
from pipeline.gguf_file import GgufContents
from pipeline.quant_types import QUANT_TYPES, check_types
from pipeline.quantize import forecasts_of, foretell, quantize


def f16_of(checkpoint, tools, folder):
    path = folder / "toy-F16.gguf"
    convert(checkpoint, tools, "toy", path)
    return GgufFile(path, sha256_of(path), path.stat().st_size, "F16")


@pytest.fixture(scope="module")
def f16(toy_gpt2, llama_cpp, tmp_path_factory):
    return f16_of(toy_gpt2, llama_cpp, tmp_path_factory.mktemp("f16"))


@pytest.fixture(scope="module")
def narrow(gpt2_vocab, llama_cpp, tmp_path_factory):
    """As wide as SmolLM2: rows of 576 weights are no multiple of 256."""
    from scripts.make_random_gpt2 import make

    folder = tmp_path_factory.mktemp("narrow")
    return f16_of(make(folder / "model", gpt2_vocab, layers=1, width=576, heads=9), llama_cpp, folder)


def test_q2_k_is_the_mixture_that_it_is_without_fallback(f16, llama_cpp, tmp_path):
    (file,) = quantize(f16, QuantizeConfig(), tools=llama_cpp, name="toy", out=tmp_path).files
    assert file.path == tmp_path / "toy-Q2_K.gguf"
    assert file.facts["matrix_types"] == {
        "attn_output": {"Q3_K": 2},
        "attn_qkv": {"Q3_K": 2},
        "ffn_down": {"Q3_K": 2},
        "ffn_up": {"Q2_K": 2},
        "position_embd": {"F32": 1},
        "token_embd": {"Q6_K": 1},
    }
    assert file.facts["fallbacks"] == []
    assert file.size_bytes == file.path.stat().st_size == file.facts["predicted_bytes"]
    assert 0 < file.facts["zeros"] < 0.5


def test_several_types_come_in_the_order_asked_and_f16_is_the_exported_file(f16, llama_cpp, tmp_path):
    cfg = QuantizeConfig(types=("Q8_0", "F16", "Q4_K_M"))
    files = quantize(f16, cfg, tools=llama_cpp, name="toy", out=tmp_path).files
    assert [file.type for file in files] == ["Q8_0", "F16", "Q4_K_M"]
    assert files[1].sha256 == f16.sha256
    assert files[1].path.name == "toy-F16.gguf"
    assert all(file.size_bytes == file.facts["predicted_bytes"] for file in files)
    assert files[0].facts["bits_per_weight"] < files[1].facts["bits_per_weight"]


@pytest.mark.slow
def test_every_type_of_the_table_is_made_as_foretold(f16, llama_cpp, tmp_path):
    kinds = tuple(kind for kind, row in QUANT_TYPES.items() if not row.needs_importance)
    files = quantize(f16, QuantizeConfig(types=kinds), tools=llama_cpp, name="toy", out=tmp_path).files
    assert [file.size_bytes for file in files] == [file.facts["predicted_bytes"] for file in files]
    assert not any(file.facts["fallbacks"] for file in files)


def test_rows_that_do_not_divide_fall_back_and_are_reported_by_name(narrow, llama_cpp, tmp_path):
    (file,) = quantize(narrow, QuantizeConfig(), tools=llama_cpp, name="toy", out=tmp_path).files
    assert {"tensor": "blk.0.ffn_up.weight", "row": 576, "block": 256, "asked": "Q2_K", "got": "Q4_0"} in (
        file.facts["fallbacks"]
    )
    stored = GgufContents(file.path).tensors
    for fallback in file.facts["fallbacks"]:
        assert stored[fallback["tensor"]].tensor_type.name == fallback["got"]
        assert stored[fallback["tensor"]].shape[0] % 256
    kept = {name for name, tensor in stored.items() if tensor.shape[0] % 256 == 0 and name.endswith("down.weight")}
    assert not kept & {fallback["tensor"] for fallback in file.facts["fallbacks"]}


def test_a_fallback_is_refused_before_anything_is_written_if_asked(narrow, llama_cpp, tmp_path):
    cfg = QuantizeConfig(types=("Q8_0", "Q2_K"), fallback="error")
    with pytest.raises(ConfigError, match=r"blk\.0\.\w+\.weight would get Q4_0 .* rows of 576 .* multiple of 256"):
        quantize(narrow, cfg, tools=llama_cpp, name="toy", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_refused_before_anything_is_written(f16, llama_cpp, tmp_path, monkeypatch):
    usage = stage.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(MachineError, match=r"need \d+\.\d MB, but the disk .* has 1\.0 MB left"):
        quantize(f16, QuantizeConfig(), tools=llama_cpp, name="toy", out=tmp_path)


def test_a_file_that_is_not_what_was_foretold_is_refused(f16, llama_cpp, tmp_path, monkeypatch):
    def otherwise(contents, kind, tools):
        forecast = foretell(contents, kind, tools)
        return stage.Forecast(forecast.size_bytes, forecast.types | {"blk.1.ffn_up.weight": "Q3_K"}, forecast.fallbacks)

    monkeypatch.setattr(stage, "foretell", otherwise)
    with pytest.raises(CheckFailed, match=r"blk\.1\.ffn_up\.weight is Q2_K, foretold was Q3_K"):
        quantize(f16, QuantizeConfig(), tools=llama_cpp, name="toy", out=tmp_path)


def test_weights_that_are_no_numbers_are_refused(toy_gpt2, llama_cpp, tmp_path):
    bad = f16_of(toy_gpt2, llama_cpp, tmp_path)
    tensor = next(t for t in GGUFReader(bad.path, "r+").tensors if t.name == "blk.0.ffn_up.weight")
    tensor.data[0, 0] = float("nan")
    tensor.data.flush()
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckFailed, match=re.escape("llama-quantize failed")):
        quantize(bad, QuantizeConfig(), tools=llama_cpp, name="toy", out=out)


def test_plan_foretells_the_size_of_a_model_with_other_weights(f16, toy_gpt2, llama_cpp, tmp_path):
    (file,) = quantize(f16, QuantizeConfig(), tools=llama_cpp, name="toy", out=tmp_path).files
    foreseen = forecasts_of(toy_gpt2, ("F16", "Q2_K"), llama_cpp, name="toy", importance=True)
    assert {kind: forecast.size_bytes for kind, forecast in foreseen.items()} == {
        "F16": f16.size_bytes,
        "Q2_K": file.size_bytes,
    }


def test_an_extended_table_stays_f16_in_a_quantized_file_of_the_size_foretold(toy_gpt2, llama_cpp, tmp_path):
    kinds = ("F16", "Q2_K", "Q8_0")
    foreseen = forecasts_of(toy_gpt2, kinds, llama_cpp, name="toy", importance=True, context=2048)
    extended = with_context(toy_gpt2, 2048, tmp_path / "model")
    convert(extended, llama_cpp, "toy", tmp_path / "long.gguf", f16_positions=True)
    f16 = GgufFile(tmp_path / "long.gguf", "0" * 64, 0, "F16")
    for file in quantize(f16, QuantizeConfig(types=kinds), tools=llama_cpp, name="toy", out=tmp_path).files:
        assert file.size_bytes == foreseen[file.type].size_bytes
        assert foreseen[file.type].types["position_embd.weight"] == "F16"
        assert file.facts["matrix_types"]["position_embd"] == {"F16": 1}
    assert (
        foreseen["F16"].size_bytes
        == forecasts_of(toy_gpt2, ["F16"], llama_cpp, name="toy", importance=True)["F16"].size_bytes
    )


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
    from scripts.make_random_gpt2 import make

    out = tmp_path / "out"
    out.mkdir()
    f16 = f16_of(make(tmp_path / "model", gpt2_vocab), llama_cpp, tmp_path)
    (file,) = quantize(f16, QuantizeConfig(fallback="error"), tools=llama_cpp, name="toy", out=out).files
    assert (file.facts["tensors"], file.facts["matrices"]) == (148, 48)
    assert round(file.size_bytes / 1e6, 1) == 70.7
    assert round(file.facts["bits_per_weight"], 2) == 4.43
