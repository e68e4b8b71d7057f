"""The GPUs as the NVIDIA driver shows them, and what torch was built for: both without importing torch, which takes
seconds, and says of most things that are wrong with a driver only that there is no GPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LIBRARY = "libcuda.so.1"  # the driver's own; a container gets it from its machine
ANSWER_SECONDS = 1.2  # a driver that nothing keeps loaded takes a second or more to start the GPUs
MODULE = re.compile(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)")
CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
BUILT_FOR = re.compile(r"^cuda\b.*= '(\d+)\.(\d+)'", re.M)
ARCHITECTURES = re.compile(rb"(?:sm|compute)_\d+[af]?(?: (?:sm|compute)_\d+[af]?)+")

Version = tuple[int, int]


class Gpu(NamedTuple):
    name: str
    capability: Version
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    devices: tuple[str, ...] = ()  # names in /dev
    version: str = ""  # of the kernel's module; "": it is not loaded
    has_library: bool = False
    answered: bool = False
    error: int = 0  # CUresult of cuInit
    cuda: Version = (0, 0)  # the newest CUDA that it knows
    gpus: tuple[Gpu, ...] = ()


class Build(NamedTuple):
    """What torch was built for: CUDA's version (None: no GPU at all) and the architectures that it has kernels for."""

    cuda: Version | None
    architectures: tuple[str, ...]


def ask(root: Path = Path("/"), library: str = LIBRARY) -> Driver:
    """What of it can be seen; of the GPUs, what the driver says within `ANSWER_SECONDS`."""
    devices = tuple(sorted(path.name for path in (root / "dev").glob("nvidia*")))
    version = loaded_version(root)
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver(devices, version)
    answers: list[tuple[int, Version, tuple[Gpu, ...]]] = []
    thread = threading.Thread(target=lambda: answers.append(answer_of(cuda)), daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not answers:
        return Driver(devices, version, has_library=True)
    return Driver(devices, version, True, True, *answers[0])


def loaded_version(root: Path) -> str:
    try:
        found = MODULE.search((root / "proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def answer_of(cuda: ctypes.CDLL) -> tuple[int, Version, tuple[Gpu, ...]]:
    """(error, newest CUDA, GPUs)."""
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = (number.value // 1000, number.value % 1000 // 10)  # 12040 is 12.4
    error = int(cuda.cuInit(0))
    if error:
        return error, version, ()
    cuda.cuDeviceGetCount(ctypes.byref(number))
    return 0, version, tuple(gpu(cuda, index) for index in range(number.value))


def gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, value, size, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(100)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    capability = []
    for attribute in CAPABILITY:
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(errors="replace"), (capability[0], capability[1]), size.value)


def torch_build(folder: Path | None = None) -> Build:
    """Of the torch in `folder`, else of the installed one."""
    try:
        folder = folder or Path(str(importlib.metadata.distribution("torch").locate_file("torch")))
        found = BUILT_FOR.search((folder / "version.py").read_text())
        if not found:
            return Build(None, ())
        return Build((int(found[1]), int(found[2])), architectures_in(folder / "lib" / "libtorch_python.so"))
    except (OSError, importlib.metadata.PackageNotFoundError):
        return Build(None, ())


def architectures_in(library: Path) -> tuple[str, ...]:
    """What torch.cuda.get_arch_list() answers: it stands in the library as one text."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = ARCHITECTURES.search(data)
        return tuple(found[0].decode().split()) if found else ()


def has_kernels(architectures: tuple[str, ...], capability: Version) -> bool:
    """Whether a GPU of that compute capability can run them: machine code (sm_) of its own generation and at most its
    step, or intermediate code (compute_) of any before. Those with a letter are for exactly one."""
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")
        its = (int(digits[:-1]), int(digits[-1]))
        if digits != number:
            fits = its == capability
        elif kind == "sm":
            fits = its[0] == capability[0] and its <= capability
        else:
            fits = its <= capability
        if fits:
            return True
    return False
