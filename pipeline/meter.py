"""Wall time and peak memory of a piece of work, of this process, of the tools it runs and of the GPU."""

from __future__ import annotations

import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_tool_peaks: list[int] = []  # bytes, one for each tool run since the meter in use was started
_gpu_peaks: list[int] = []  # likewise, of those that use a GPU


def saw_tool(peak_bytes: int, gpu_bytes: int | None = None) -> None:
    """To be called by whoever waits for a child process, with the peaks of its resident and its GPU memory."""
    _tool_peaks.append(peak_bytes)
    if gpu_bytes is not None:
        _gpu_peaks.append(gpu_bytes)


class Meter:
    seconds: float
    peak_bytes: int  # of this process or of the largest tool it ran, whichever is more
    peak_gpu_bytes: int | None  # likewise, of one GPU; None: none is visible

    def __enter__(self) -> Meter:
        _tool_peaks.clear()
        _gpu_peaks.clear()
        reset_peaks()
        self.started = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.monotonic() - self.started
        self.peak_bytes = max([peak_of_process(), *_tool_peaks])
        own = peak_of_gpu()
        self.peak_gpu_bytes = None if own is None else max([own, *_gpu_peaks])


def reset_peaks() -> None:
    """Start the kernel's high-water mark of this process anew (proc(5), clear_refs: 5), and CUDA's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        log.debug("the peak of memory cannot be reset here; a stage's peak includes the stages before it")
    cuda = visible_cuda()
    if cuda:
        cuda.reset_peak_memory_stats()


def peak_of_process() -> int:
    """Bytes resident at most since the last reset."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024


def peak_of_gpu() -> int | None:
    cuda = visible_cuda()
    return int(cuda.max_memory_allocated()) if cuda else None


def visible_cuda() -> Any:
    """torch.cuda if a stage has imported torch and sees a GPU; importing it here would slow every command."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_available() else None
