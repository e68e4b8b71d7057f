"""The process groups of programs that run as children: each dies as a whole, with what it has started itself."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

PR_SET_PDEATHSIG = 1  # linux/prctl.h

running: set[int] = set()  # each named by its first process
LIBC = ctypes.CDLL(None)


def dies_with_this() -> Callable[[], None] | None:
    """To be called in a child before it becomes a program: the kernel kills it when the thread that started it ends.

    That holds for SIGKILL too, after which nobody else could. None where the system does not know this.
    """
    if not sys.platform.startswith("linux"):
        return None
    parent = os.getpid()

    def tie() -> None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            os._exit(1)

    return tie


def die_with_parent() -> None:
    """The same for this process, which somebody else has started."""
    if sys.platform.startswith("linux"):
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, for one that is dead already
        os.killpg(group, signal.SIGKILL)


def kill_all() -> None:
    for group in list(running):
        kill(group)


def end_all() -> None:
    """Those that a signal kept this process from ending where it had started them."""
    for group in list(running):
        kill(group)
        reap(group)
        running.discard(group)


def reap(group: int) -> None:
    """Ask for the exit codes of the group's orphans: as process 1 this process is their parent, elsewhere it is not."""
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-group, 0)
