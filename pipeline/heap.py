"""Memory that tensors give back, kept for the next ones."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h


@contextmanager
def reused() -> Iterator[None]:
    """From here on what is freed stays with the process, for whatever comes next; what is free at the end of the block
    goes back to the system.

    glibc maps a large tensor by itself and unmaps it when it is freed, so the system hands out and zeroes the same
    pages again and again: a fifth of a training step on a CPU, for a tenth more memory (scripts/bench_step.py). Does
    nothing with another C library.
    """
    if libc := glibc():
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        give_back()


def give_back() -> None:
    """What was freed goes to the system."""
    if libc := glibc():
        libc.malloc_trim(0)


@cache
def glibc() -> Any:
    """None where the process has another C library."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
