"""What keeps a job from its GPU, from what the driver shows and torch was built for."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.cuda_driver import Build, Driver, Version, has_kernels
from pipeline.finding import Finding

GIVE_A_GPU = "start the container with --gpus all (or ask the scheduler for nvidia.com/gpu)"

# The oldest driver for each CUDA, by its first number: a newer second number needs no newer driver.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
SOURCE = "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"

NOT_GIVEN = ("", "void", "none")  # of NVIDIA_VISIBLE_DEVICES

# cuInit's answers by CUresult (cuda.h), and what they come from.
NO_DEVICE = 100
ERRORS = {
    34: ("CUDA's stub for linking was loaded", ("a folder lib64/stubs is in LD_LIBRARY_PATH; take it out",)),
    46: (
        "the GPU is not available",
        ("another process has it for itself (nvidia-smi: compute mode exclusive); wait for that, or take another GPU",),
    ),
    NO_DEVICE: ("the driver finds no GPU", ()),
    802: (
        "the GPUs are not ready",
        ("the fabric manager of a machine with NVSwitch does not run; start nvidia-fabricmanager on the machine",),
    ),
    803: (
        "the driver's library and its kernel module are of two versions",
        (
            "the machine's driver was updated and the machine not restarted since; restart it",
            "the image brings a libcuda.so.1 of its own; take it out",
        ),
    ),
    804: (
        "the image's CUDA compatibility package does not work with this GPU",
        ("such packages work on data centre GPUs only; take it out of the image and update the machine's driver",),
    ),
    999: (
        "the driver failed",
        (
            "the kernel module nvidia_uvm is not loaded; run nvidia-modprobe -u on the machine",
            "the GPU hangs or has fallen off the bus (dmesg shows an Xid); restart the machine",
        ),
    ),
}


def gpu_findings(driver: Driver, build: Build, device: str, env: Mapping[str, str]) -> list[Finding]:
    """`device` is the setting. A GPU that is missing matters only to whom one was promised."""
    if device == "cpu":
        return []
    promised = device == "cuda" or env.get("NVIDIA_VISIBLE_DEVICES", "") not in NOT_GIVEN
    if build.cuda is None:
        return [without_cuda(promised)] if promised or driver.gpus else []
    if driver.has_library and not driver.answered:
        return [slow()]
    has_gpu = bool(driver.gpus) or driver.error not in (0, NO_DEVICE)
    if has_gpu and 0 < driver.cuda[0] < build.cuda[0]:
        return [too_old(driver, build.cuda, promised)]
    if not driver.gpus:
        return [none_visible(driver, build.cuda, promised, env)]
    return [
        no_kernels(gpu.name, gpu.capability, build)
        for gpu in driver.gpus[:1]  # the one that a job computes on
        if build.architectures and not has_kernels(build.architectures, gpu.capability)
    ]


def without_cuda(promised: bool) -> Finding:
    return Finding(
        promised,
        "this torch was built without CUDA, so no GPU can be used",
        (
            "this is the CPU variant of the image; take the one without -cpu",
            "PyTorch came from an index for CPUs; install it from the usual one",
        ),
    )


def slow() -> Finding:
    return Finding(
        False,
        "the driver has not answered yet",
        (
            "nothing keeps it loaded between programs; run nvidia-persistenced on the machine",
            "a GPU hangs (dmesg shows an Xid); restart the machine",
        ),
    )


def too_old(driver: Driver, needed: Version, promised: bool) -> Finding:
    oldest = OLDEST_DRIVER.get(needed[0], "of that CUDA")
    return Finding(
        promised,
        f"the driver {driver.version or '(version unknown)'} is too old: it knows CUDA {dotted(driver.cuda)}, but this "
        f"torch was built for CUDA {dotted(needed)}, which needs driver {oldest} or newer ({SOURCE})",
        (
            f"the machine's driver is older than this image; update it to {oldest} or newer (on GKE: "
            "gke-gpu-driver-version=latest, on EC2: a newer AMI)",
            "the GPU is too old for newer drivers; take a newer one, or set device to cpu",
        ),
    )


def none_visible(driver: Driver, needed: Version, promised: bool, env: Mapping[str, str]) -> Finding:
    what, causes = "no GPU is visible", []
    if (hidden := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        causes.append(f"CUDA_VISIBLE_DEVICES is {hidden!r} and hides it; unset it")
    if driver.error:
        said, likely = ERRORS.get(driver.error, ("the driver failed", ()))
        what += f": {said} (CUDA error {driver.error})"
        causes += likely
    if not driver.has_library and (driver.version or driver.devices):
        seen = f"driver {driver.version}" if driver.version else f"/dev/{driver.devices[0]}"
        what += f": {seen} is there, but its library libcuda.so.1 is not"
        if "NVIDIA_DRIVER_CAPABILITIES" in env:
            given = env["NVIDIA_DRIVER_CAPABILITIES"]
            causes.append(f"NVIDIA_DRIVER_CAPABILITIES is {given!r}; it must have compute, or be all")
    if driver.error in (0, NO_DEVICE):
        causes += not_given(driver, needed)
    return Finding(promised, what, tuple(causes))


def not_given(driver: Driver, needed: Version) -> list[str]:
    oldest = f"{OLDEST_DRIVER[needed[0]]} or newer" if needed[0] in OLDEST_DRIVER else "a newer one"
    return [
        f"it was not given to the container; {GIVE_A_GPU}",
        "the machine lacks NVIDIA's container toolkit or device plugin; install it there",
        f"the machine has no GPU, or no driver, which nvidia-smi on it shows; the driver must be {oldest} ({SOURCE})",
    ]


def unused(driver: Driver) -> Finding:
    """For a GPU that the driver shows and torch does not: training goes on without it, and takes many times longer."""
    return Finding(
        False,
        f"torch does not see {driver.gpus[0].name}, so jobs compute on the CPU; device cuda makes that an error",
        (
            "driver or GPU do not fit this torch, as said above",
            "torch's own libraries of CUDA are not whole; build the image anew, or install quotesmith anew",
        ),
    )


def no_kernels(name: str, capability: Version, build: Build) -> Finding:
    newest = max(int(each.partition("_")[2].rstrip("af")) for each in build.architectures)
    old = capability[0] * 10 + capability[1] < newest
    return Finding(
        True,
        f"this torch has no code for {name}, whose compute capability is {dotted(capability)}: it was built for "
        f"{', '.join(build.architectures)}",
        (
            "the GPU is older than this torch supports; take a newer one, or set device to cpu"
            if old
            else "the GPU is newer than this torch; take a newer image, or another GPU, or set device to cpu",
        ),
    )


def dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
