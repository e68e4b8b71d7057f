import pytest
import torch

from pipeline.artifacts import Checkpoint
from pipeline.errors import ConfigError, ServiceUnavailable
from pipeline.preflight import check_model, preflight
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
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_training(flags, sentence, toy_gpt2, llama_cpp, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        check_model(Checkpoint.of(toy_gpt2, {}), job(tmp_path, **flags), llama_cpp)


@pytest.mark.slow
def test_a_fallback_that_is_an_error_is_refused_before_training(gpt2_vocab, llama_cpp, tmp_path):
    narrow = make(tmp_path / "narrow", gpt2_vocab, layers=1, width=96, heads=4)
    base = Checkpoint.of(narrow, {})
    check_model(base, job(tmp_path), llama_cpp)
    with pytest.raises(ConfigError, match="96 weights are not a multiple of 256"):
        check_model(base, job(tmp_path, **{"quantize.fallback": "error"}), llama_cpp)
