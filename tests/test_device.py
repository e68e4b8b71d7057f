import pytest
import torch

from pipeline import threads
from pipeline.device import choose_device, choose_precision, device_errors, limit_threads
from pipeline.errors import ConfigError, MachineError, ServiceUnavailable, TryLater


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


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ConfigError),
        (torch.AcceleratorError("uncorrectable ECC error encountered"), TryLater),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"), TryLater),
        (MemoryError(), MachineError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (ConfigError("ours"), ConfigError),
    ],
)
def test_what_is_the_machines_fault_has_its_code_and_the_rest_stays_a_bug(error, kind):
    with pytest.raises(Exception) as raised, device_errors("recover"):
        raise error
    assert type(raised.value) is kind
    assert (raised.value is error) == (kind is RuntimeError or str(error) == "ours")
    assert raised.value is error or str(raised.value).startswith("recover: ")


def test_memory_that_torch_cannot_get_is_the_machines_error():
    with pytest.raises(MachineError, match="can't allocate memory"), device_errors("recover"):
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_a_gpu_that_is_visible_but_broken_is_worth_a_retry_elsewhere(gpu, monkeypatch):
    def broken(index):
        raise torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    with pytest.raises(TryLater, match="preflight: the GPU failed"):
        choose_device("auto")


@pytest.mark.parametrize(("allowed", "found"), [(1.5, 2), (64, 3)])
def test_torch_takes_no_more_threads_than_the_container_has_cores(allowed, found, monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: allowed)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        limit_threads()
        assert torch.get_num_threads() == found
    finally:
        torch.set_num_threads(before)
