import pytest
import torch

from pipeline.errors import ConfigError, NotAllowed, ServiceUnavailable
from pipeline.preflight import preflight
from pipeline.settings import resolve


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
def test_a_folder_that_cannot_be_written_is_refused(which, llama_cpp, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((NotAllowed, ConfigError), match="file"):
        preflight(job(tmp_path, **{which: str(tmp_path / "file" / "x")}))
