import pytest

from pipeline.cuda_driver import Build, Driver, Gpu
from pipeline.gpu_check import gpu_findings

BUILD = Build((13, 0), ("sm_75", "sm_80", "sm_90", "sm_120"))
DEVICES = ("nvidia0", "nvidiactl")


def driver(**more):
    found = {"devices": DEVICES, "version": "580.65.06", "has_library": True, "answered": True, "cuda": (13, 0)}
    return Driver(**{**found, **more})


def with_gpu(capability=(8, 9), **more):
    return driver(gpus=(Gpu("NVIDIA L4", capability, 24_000_000_000),), **more)


GOOD = with_gpu()
NONE = Driver()


def findings(found, build=BUILD, device="auto", env=None):
    return gpu_findings(found, build, device, env or {})


def test_a_gpu_that_torch_can_use_needs_no_word():
    assert findings(GOOD) == findings(GOOD, device="cuda") == findings(GOOD, build=Build((13, 0), ())) == []


@pytest.mark.parametrize(
    ("device", "env", "fatal"),
    [
        ("auto", {}, False),
        ("auto", {"NVIDIA_VISIBLE_DEVICES": "void"}, False),
        ("auto", {"NVIDIA_VISIBLE_DEVICES": "all"}, True),
        ("cuda", {}, True),
    ],
)
def test_a_missing_gpu_is_a_problem_only_where_one_was_promised(device, env, fatal):
    (found,) = findings(NONE, device=device, env=env)
    assert found.fatal is fatal and found.what == "no GPU is visible"
    assert "--gpus all" in found.causes[0] and "580 or newer" in found.causes[-1]
    assert found.lines()[1].startswith("  1. it was not given to the container")


def test_a_job_for_the_cpu_needs_no_gpu():
    assert findings(NONE, device="cpu", env={"NVIDIA_VISIBLE_DEVICES": "all"}) == []
    assert findings(with_gpu((3, 5)), device="cpu") == []


@pytest.mark.parametrize("found", [with_gpu(cuda=(12, 2), version="535.104.05"), driver(cuda=(12, 2), error=999)])
def test_a_driver_that_is_too_old_is_told_with_the_one_that_is_needed(found):
    (old,) = findings(found, device="cuda")
    assert old.fatal and "knows CUDA 12.2" in old.what and "needs driver 580 or newer (https://docs.nvidia" in old.what
    assert not findings(found)[0].fatal  # the job takes the CPU
    assert findings(with_gpu(cuda=(13, 0)), build=Build((13, 2), BUILD.architectures)) == []  # within one CUDA


@pytest.mark.parametrize(("capability", "why"), [((7, 0), "older than"), ((13, 0), "newer than")])
def test_a_gpu_without_code_for_it_fails_every_job(capability, why):
    (found,) = findings(with_gpu(capability))
    assert found.fatal and f"capability is {capability[0]}.{capability[1]}" in found.what and why in found.causes[0]


@pytest.mark.parametrize(
    ("found", "env", "what", "cause"),
    [
        (
            driver(error=100),
            {"CUDA_VISIBLE_DEVICES": ""},
            "finds no GPU (CUDA error 100)",
            "CUDA_VISIBLE_DEVICES is ''",
        ),
        (driver(error=100), {}, "finds no GPU", "not given to the container"),
        (driver(error=802), {}, "not ready", "fabric"),
        (driver(error=803), {}, "two versions", "restart"),
        (driver(error=804), {}, "compatibility", "data centre"),
        (driver(error=999), {}, "CUDA error 999", "nvidia_uvm"),
        (driver(error=34), {}, "stub", "LD_LIBRARY_PATH"),
        (Driver(DEVICES, "580.65.06"), {}, "driver 580.65.06 is there, but its library", "--gpus all"),
        (Driver(DEVICES), {"NVIDIA_DRIVER_CAPABILITIES": "graphics"}, "/dev/nvidia0 is there", "must have compute"),
    ],
)
def test_what_hides_a_gpu_is_named_with_its_likeliest_cause_first(found, env, what, cause):
    (hidden,) = findings(found, device="cuda", env=env)
    assert hidden.fatal and what in hidden.what and cause in hidden.causes[0]


def test_an_error_that_nobody_knows_is_told_by_its_number():
    (found,) = findings(driver(error=777), device="cuda")
    assert found.lines() == ["problem: no GPU is visible: the driver failed (CUDA error 777)"]


def test_a_driver_that_does_not_answer_is_a_remark():
    (found,) = findings(driver(answered=False), device="cuda")
    assert not found.fatal and "has not answered" in found.what


def test_a_torch_for_cpus_is_told_only_where_there_is_or_should_be_a_gpu():
    cpu = Build(None, ())
    assert findings(NONE, build=cpu) == []
    assert not findings(GOOD, build=cpu)[0].fatal
    assert findings(NONE, build=cpu, device="cuda")[0].fatal
