import pytest
import torch

from pipeline.device import choose_device, choose_precision
from pipeline.errors import ConfigError, ServiceUnavailable


@pytest.fixture
def gpu(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)


@pytest.mark.parametrize("gpu", [False], indirect=True)
def test_cuda_without_a_visible_gpu_is_a_service_that_is_missing(gpu):
    with pytest.raises(ServiceUnavailable, match="--gpus all"):
        choose_device("cuda")
    assert choose_device("auto").name == "cpu"
    assert "no GPU" in choose_device("auto").why


@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_a_visible_gpu_is_taken_unless_cpu_is_asked_for(gpu):
    assert choose_device("auto") == ("cuda", "auto: Some GPU is visible")
    assert choose_device("cuda").name == "cuda"
    assert choose_device("cpu").name == "cpu"


def test_auto_precision_is_fp16_on_a_gpu_and_fp32_on_a_cpu():
    assert choose_precision("auto", "cuda").name == "fp16"
    assert choose_precision("auto", "cpu").name == "fp32"
    assert choose_precision("bf16", "cpu").name == "bf16"


@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_a_precision_the_device_does_not_have_is_refused(gpu):
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        choose_precision("fp16", "cpu")
    with pytest.raises(ConfigError, match="Ampere"):
        choose_precision("bf16", "cuda")
