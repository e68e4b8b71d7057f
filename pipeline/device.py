"""Where to compute and in which number format, each with the reason it was chosen: both are printed and
recorded, so that nobody has to guess later why a run took fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from pipeline import threads
from pipeline.errors import ConfigError, MachineError, ServiceUnavailable, TryLater
from pipeline.gpu_check import GIVE_A_GPU

GPU_FAILED = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error")  # in errors without a class of their own
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


class Device(NamedTuple):
    name: Literal["cpu", "cuda"]
    why: str


class Precision(NamedTuple):
    name: Literal["fp32", "fp16", "bf16"]
    why: str


def limit_threads() -> None:
    """torch counts the machine's cores, and its threads then wait in turns for the container's share of their time:
    products of matrices took three times as long with two threads in a share of one core."""
    torch.set_num_threads(min(torch.get_num_threads(), threads.count()))


def choose_device(asked: str) -> Device:
    """`asked` is auto, cpu or cuda. cuda without a visible GPU is `ServiceUnavailable`: a retry elsewhere can help."""
    visible = torch.cuda.is_available()
    if asked == "cpu":
        return Device("cpu", "asked for")
    if visible:
        with device_errors("preflight"):
            name = torch.cuda.get_device_name(0)
        return Device("cuda", f"asked for: {name}" if asked == "cuda" else f"auto: {name} is visible")
    if asked == "cuda":
        raise ServiceUnavailable(
            f"device is cuda but no GPU is visible to this process; {GIVE_A_GPU}, or set device to auto or cpu "
            "(--self-test says why)"
        )
    return Device("cpu", "auto: no GPU is visible")


def choose_precision(asked: str, device: str) -> Precision:
    """The format of the arithmetic; weights and optimizer state stay in fp32 whatever is chosen."""
    if asked == "auto":
        if device == "cuda":
            return Precision("fp16", "auto: a GPU computes in fp16, over fp32 master weights")
        return Precision("fp32", "auto: no GPU")
    if asked == "fp16":
        if device == "cpu":
            raise ConfigError("train.precision fp16 needs a GPU, but the device is cpu; use fp32 or bf16")
        return Precision("fp16", "asked for")
    if asked == "bf16":
        if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError(
                "train.precision bf16 needs a GPU of the Ampere generation or newer, but this is "
                f"{torch.cuda.get_device_name(0)}; use fp16"
            )
        return Precision("bf16", "asked for")
    return Precision("fp32", "asked for")


def arithmetic_of(asked: str, device: str) -> Precision:
    """Of the short trainings after fine-tuning, whose weights are fp32 too. `asked` is auto, fp32 or bf16."""
    if asked != "auto":
        return choose_precision(asked, device)
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "auto: this GPU has bf16")
        return Precision("fp32", "auto: this GPU has no bf16")
    if any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16")):
        return Precision("bf16", "auto: this CPU multiplies in bf16, twice as fast")
    return Precision("fp32", "auto: this CPU has no bf16 instructions")


@contextmanager
def device_errors(what: str) -> Iterator[None]:
    """torch's errors that are the machine's fault as ours; `what` was being done."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as e:
        raise ConfigError(
            f"{what}: the GPU's memory is not enough ({first_line(e)}); take a larger GPU or a smaller model, or set "
            "tokens.max_length or this stage's batch lower"
        ) from e
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, MemoryError) or NO_MEMORY in str(e):
            raise MachineError(f"{what}: memory ran out ({first_line(e)}); take a machine with more") from e
        if isinstance(e, torch.AcceleratorError) or any(sign in str(e) for sign in GPU_FAILED):
            raise TryLater(
                f"{what}: the GPU failed ({first_line(e)}); run again, on another machine if it fails again"
            ) from e
        raise


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
