from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig

from pipeline import preflight as stage
from pipeline.artifacts import Checkpoint
from pipeline.errors import ConfigError, ServiceUnavailable
from pipeline.forecast import Forecast, forecasts_of
from pipeline.llama_cpp import PROGRAMS
from pipeline.preflight import check_files, check_model, check_positions, check_shape, preflight
from pipeline.settings import resolve
from scripts.make_random_gpt2 import make


def job(tmp_path, **flags):
    return resolve({"work_dir": str(tmp_path / "work"), "output": str(tmp_path / "out"), **flags}, {}).config


def test_what_the_job_stands_on_is_found_with_reasons(llama_cpp, tmp_path):
    tools, device = preflight(job(tmp_path))
    assert tools == llama_cpp and device.why


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"sparsity.method": "magic"}, "magnitude, random"),
        ({"quantize.types": "Q2_K,Q9"}, "Q9"),
        ({"output": "ftp://bucket/x"}, "gs://"),
        ({"llama_cpp": "/nowhere"}, "build_llama_cpp.sh"),
    ],
)
def test_a_name_that_means_nothing_is_refused_before_anything_is_loaded(flags, sentence, llama_cpp, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        preflight(job(tmp_path, **flags))


def test_a_program_that_does_not_start_is_refused_before_anything_is_loaded(llama_cpp, tmp_path):
    for path in llama_cpp.root.iterdir():
        (tmp_path / "tools" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "tools" / path.name).symlink_to(path)
    (tmp_path / "tools" / "bin").unlink()
    (tmp_path / "tools" / "bin").mkdir()
    for name in PROGRAMS:
        (tmp_path / "tools" / "bin" / name).write_text("of another machine")
        (tmp_path / "tools" / "bin" / name).chmod(0o755)
    with pytest.raises(ConfigError, match=r"llama-quantize does not start \(Exec format error\)"):
        preflight(job(tmp_path, llama_cpp=str(tmp_path / "tools")))


@pytest.mark.parametrize(("upload", "refused"), [("always", True), ("auto", False), ("never", False)])
def test_where_copies_go_must_be_writable_if_they_are_wanted(upload, refused, llama_cpp, tmp_path):
    (tmp_path / "file").write_text("in the way")
    flags = {"resume.uri": str(tmp_path / "file" / "x"), "resume.upload": upload}
    with pytest.raises(ConfigError, match="Not a directory") if refused else nullcontext():
        preflight(job(tmp_path, **flags))


def test_a_gpu_asked_for_but_not_visible_is_worth_a_retry_elsewhere(llama_cpp, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is visible here")
    with pytest.raises(ServiceUnavailable, match="no GPU is visible"):
        preflight(job(tmp_path, device="cuda"))


@pytest.mark.parametrize("which", ["work_dir", "output"])
def test_a_file_where_a_folder_is_needed_is_refused(which, llama_cpp, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="Not a directory"):
        preflight(job(tmp_path, **{which: str(tmp_path / "file" / "x")}))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"tokens.max_length": "1025"}, "the base model has 1024 positions"),
        ({"sparsity.pattern": "1:3", "sparsity.ratio": "0.6667"}, "multiples of 3"),
        ({"export.context": "512"}, "export.context 512 would shrink the table of the base model's 1024 positions"),
        ({"export.context": "1024"}, "export.context 1024 adds nothing"),
        ({"export.context_steps": "5"}, "export.context_steps trains the positions that export.context adds"),
        ({"export.context": "4096", "tokens.max_length": "2048"}, "export.context adds more only after training"),
        ({"evaluate.max_new_tokens": "1024"}, "the exported model will have 1024 positions.* or a larger export.cont"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_training(flags, sentence, toy_gpt2, llama_cpp, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        check_model(Checkpoint.of(toy_gpt2, {}), job(tmp_path, **flags), llama_cpp)


def test_more_positions_allow_longer_generations(toy_gpt2, tmp_path):
    flags = {"export.context": "4096", "evaluate.max_new_tokens": "4095"}
    check_shape(Checkpoint.of(toy_gpt2, {}), job(tmp_path, **flags))


def test_a_model_with_rotary_positions_cannot_be_extended(tmp_path):
    config = LlamaConfig(max_position_embeddings=512)
    with pytest.raises(ConfigError, match="the base model is a llama, whose 512 positions are rotary"):
        check_positions(config, job(tmp_path, **{"export.context": "4096"}))
    with pytest.raises(ConfigError, match=r"choose at most 511$"):
        check_positions(config, job(tmp_path, **{"evaluate.max_new_tokens": "512"}))


def test_a_file_that_will_exceed_its_gate_is_refused_before_training(toy_gpt2, llama_cpp, tmp_path, monkeypatch):
    base = Checkpoint.of(toy_gpt2, {})
    foretold = forecasts_of(base.path, ["Q2_K"], llama_cpp, name="toy", importance=True)
    size = foretold["Q2_K"].size_bytes
    asked = []
    monkeypatch.setattr(stage, "forecasts_of", lambda *of, **more: asked.append(of) or foretold)
    both = {"quantize.fallback": "error", "name": "toy"}
    with pytest.raises(ConfigError, match=rf"toy-Q2_K\.gguf will have {size:,} bytes, but gate\.max_bytes allows"):
        check_model(base, job(tmp_path, **both, **{"gate.max_bytes": str(size - 1)}), llama_cpp)
    assert len(asked) == 1  # one forecast for both checks
    check_model(base, job(tmp_path, **both, **{"gate.max_bytes": str(size)}), llama_cpp)


@pytest.mark.parametrize(
    ("gate", "budget", "sentence"),
    [
        (28_200, 0, None),
        (28_199, 0, r"will have 28,200 bytes, but gate\.max_bytes allows 28,199; .* quantize\.max_bytes to 28199$"),
        (9_416, 9_416, None),
        (20_000, 20_001, r"quantize\.max_bytes lets .* have 20,001 bytes, but gate\.max_bytes allows 20,000"),
        (9_415, 0, r"smaller than 9,416 bytes, but gate\.max_bytes allows 9,415; set it to at least 9416$"),
        (9_415, 9_999, r"smaller than 9,416 bytes, but gate\.max_bytes allows 9,415; set it to at least 9416$"),
    ],
)
def test_a_size_that_its_gate_refuses_is_refused_before_training(gate, budget, sentence, tmp_path):
    """100 rows of 256 and 1,000 bytes of other things: 28,200 bytes as they are, 9,416 as Q2_K."""
    foretold = Forecast(28_200, {"token_embd.weight": "Q8_0"}, (), {"token_embd.weight": (256, 100)})
    limits = {"gate.max_bytes": str(gate), "quantize.max_bytes": str(budget)}
    cfg = job(tmp_path, **limits, **{"name": "toy", "quantize.types": "Q8_0"})
    with pytest.raises(ConfigError, match=sentence) if sentence else nullcontext():
        check_files({"Q8_0": foretold}, cfg)


def test_a_type_that_loses_zeros_that_are_to_be_kept_is_refused_before_training(toy_gpt2, llama_cpp, tmp_path):
    base = Checkpoint.of(toy_gpt2, {})
    with pytest.raises(ConfigError, match=r"sparsity\.keep_zeros needs types that can hold a zero, but Q4_K_M stores"):
        check_model(base, job(tmp_path, **{"sparsity.keep_zeros": "true", "quantize.types": "Q4_K_M"}), llama_cpp)
    check_model(base, job(tmp_path, **{"sparsity.keep_zeros": "true"}), llama_cpp)


@pytest.mark.slow
def test_a_fallback_that_is_an_error_is_refused_before_training(gpt2_vocab, llama_cpp, tmp_path):
    narrow = make(tmp_path / "narrow", gpt2_vocab, layers=1, width=96, heads=4)
    base = Checkpoint.of(narrow, {})
    check_model(base, job(tmp_path), llama_cpp)
    with pytest.raises(ConfigError, match="96 weights are not a multiple of 256"):
        check_model(base, job(tmp_path, **{"quantize.fallback": "error"}), llama_cpp)
