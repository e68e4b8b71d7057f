import importlib.metadata
import time

import pytest
import torch

from pipeline import cuda_driver
from pipeline.cuda_driver import Build, Driver, Gpu, architectures_in, ask, has_kernels, loaded_version, torch_build

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"


@pytest.fixture
def machine(tmp_path):
    """A file system as a machine with a GPU has it."""
    for name in ("dev/nvidia0", "dev/nvidiactl", "dev/null", "proc/driver/nvidia/version"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(OPEN)
    return tmp_path


def test_a_driver_says_what_it_knows_and_which_gpus_there_are(machine, libcuda, monkeypatch):
    monkeypatch.setattr(cuda_driver, "ANSWER_SECONDS", 60)
    monkeypatch.setenv("CUDA_GPUS", "2")
    monkeypatch.setenv("CUDA_KNOWN", "12040")
    l4, t4 = (Gpu(f"NVIDIA {name}", (8, 9), 24_000_000_000) for name in ("L4", "T4"))
    devices = ("nvidia0", "nvidiactl")
    assert ask(machine, str(libcuda)) == Driver(devices, "580.65.06", True, True, 0, (12, 4), (l4, t4))


def test_a_driver_that_fails_says_with_which_error(machine, libcuda, monkeypatch):
    monkeypatch.setattr(cuda_driver, "ANSWER_SECONDS", 60)
    monkeypatch.setenv("CUDA_ERROR", "803")
    found = ask(machine, str(libcuda))
    assert (found.answered, found.error, found.cuda, found.gpus) == (True, 803, (13, 0), ())


def test_a_driver_that_hangs_is_not_waited_for(machine, libcuda, monkeypatch):
    monkeypatch.setenv("CUDA_SECONDS", "60")
    monkeypatch.setattr(cuda_driver, "ANSWER_SECONDS", 0.1)
    begun = time.monotonic()
    found = ask(machine, str(libcuda))
    assert time.monotonic() - begun < 30
    assert found.has_library and not found.answered


def test_a_machine_without_a_driver_has_none(tmp_path):
    assert ask(tmp_path, "libcuda-of-nobody.so.1") == Driver()


@pytest.mark.parametrize(("text", "version"), [(CLOSED, "535.104.05"), (OPEN, "580.65.06"), ("something else", "")])
def test_the_version_of_the_kernels_module_is_read(text, version, machine):
    (machine / "proc/driver/nvidia/version").write_text(text)
    assert loaded_version(machine) == version


def test_what_torch_was_built_for_is_what_torch_itself_says():
    build = torch_build()
    assert (".".join(map(str, build.cuda)) if build.cuda else None) == torch.version.cuda
    assert list(build.architectures) == (torch._C._cuda_getArchFlags().split() if build.cuda else [])


def test_a_build_for_cuda_is_read_without_being_imported(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "version.py").write_text("__version__ = '2.14.1+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    (tmp_path / "lib/libtorch_python.so").write_bytes(
        bytes(5000) + b"sm_%d\0sm_75 sm_80 sm_90a compute_90\0" + bytes(99)
    )
    assert torch_build(tmp_path) == Build((13, 0), ("sm_75", "sm_80", "sm_90a", "compute_90"))
    (tmp_path / "lib/libtorch_python.so").write_bytes(b"nothing of that kind")
    assert architectures_in(tmp_path / "lib/libtorch_python.so") == ()
    assert torch_build(tmp_path / "nowhere") == Build(None, ())


def test_where_there_is_no_torch_it_was_built_for_nothing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert torch_build() == Build(None, ())


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("sm_75 sm_80 sm_90", (8, 9), True),  # machine code of a lower step of its generation
        ("sm_75 sm_90", (8, 9), False),
        ("sm_86", (8, 0), False),
        ("sm_75 sm_80", (7, 0), False),
        ("sm_75 compute_80", (9, 0), True),  # intermediate code, translated on the spot
        ("sm_75 compute_90", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (9, 1), False),
        ("sm_100 sm_120", (12, 0), True),
        ("sm_100", (12, 0), False),
    ],
)
def test_which_gpus_can_run_a_build(architectures, capability, runs):
    assert has_kernels(tuple(architectures.split()), capability) is runs
