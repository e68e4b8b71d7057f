"""Programs run as children: never left running, and their failure told in one sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from pipeline import groups, heap, openmp, signals
from pipeline.disk import is_full
from pipeline.errors import CheckFailed, MachineError, TryLater
from pipeline.meter import saw_tool

A_DISK = "because a disk did (input/output error); check it, or run again elsewhere"
NO_MEMORY = "for lack of memory; run again with more memory"
READ_ONLY = "because a disk is read-only now, as a failing one is made; check it, or run again elsewhere"
NO_THREAD = "because no thread or process could be started; raise the limit (ulimit -u, pids.max), run again"
MACHINE = {  # what a program says when it is not the one to blame
    "Input/output error": A_DISK,
    "iostream error": A_DISK,  # all that a C++ program hears of any error of a disk
    "Read-only file system": READ_ONLY,
    # Python; C++; the system; ggml
    **dict.fromkeys(("MemoryError", "bad_alloc", "Cannot allocate memory"), NO_MEMORY),
    **dict.fromkeys(("insufficient memory", "failed to allocate", "unable to allocate"), NO_MEMORY),
    **dict.fromkeys(("can't start new thread", "Resource temporarily unavailable"), NO_THREAD),
    "Too many open files": "because too many files are open; raise the limit (ulimit -n), run again",
}
ENDED: dict[int, str] = {  # by the system
    signal.SIGKILL: "was killed, probably for lack of memory; run again with more memory",
    signal.SIGBUS: "was ended by SIGBUS: a disk or memory could not give a page of a file; run again, or elsewhere",
}

WATCH_SECONDS = 0.02
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # somebody's wish, no fault of the program

Process = subprocess.Popen[bytes]


class Finished(NamedTuple):
    stdout: str
    stderr: str
    peak_bytes: int


def run(command: Sequence[str | Path], *, writes_in: Path | None = None, cwd: Path | None = None) -> Finished:
    """Runs one program to its end, in the folder `cwd` where given; what it prints need not be UTF-8.

    Raises `CheckFailed` with its last line when it fails, `MachineError` when memory or the disk of `writes_in`
    ran out.
    """
    with tempfile.TemporaryFile() as stdout, started(command, stdout=stdout, cwd=cwd) as (process, stderr):
        peak_bytes = watch(process)
        saw_tool(peak_bytes)
        require_success(process, stderr, writes_in)
        return Finished(text_of(stdout), text_of(stderr), peak_bytes)


def watch(process: Process) -> int:
    """Waits for the end; returns the peak of its resident memory, as last seen.

    Not wait4's ru_maxrss: that begins at the memory of the process it was forked from, so at torch's gigabytes.
    """
    peak_bytes = 0
    while True:
        with suppress(OSError, IndexError):  # it has just ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak_bytes = 1024 * int(status.split("VmHWM:")[1].split()[0])
        with suppress(subprocess.TimeoutExpired):
            process.wait(WATCH_SECONDS)
            return peak_bytes


@contextmanager
def started(
    command: Sequence[str | Path],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[bytes],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[tuple[Process, IO[bytes]]]:
    """A running program and the file its stderr goes to. `env` is added to this process's environment.

    Neither it nor what it has started outlives the block, however that is left, nor does it outlive this process.
    """
    # llama.cpp takes options from LLAMA_ARG_* too, torchrun from PET_*; what runs here depends on its arguments alone
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_", "PET_"))}
    openmp.spin_briefly(environment)
    environment |= env or {}
    heap.give_back()  # the program may need it
    with tempfile.TemporaryFile() as stderr:
        process = None
        try:
            with signals.untorn():
                process = subprocess.Popen(
                    command,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    env=environment,
                    cwd=cwd,
                    process_group=0,  # of its own: a Ctrl-C is for this process, which ends the other
                    preexec_fn=groups.dies_with_this(),
                )
                groups.running.add(process.pid)
            yield process, stderr
        finally:
            if process:
                with signals.untorn():
                    end(process)


def end(process: Process) -> None:
    """What is left of it, and of what it has started."""
    groups.kill(process.pid)
    process.wait()
    groups.reap(process.pid)
    groups.running.discard(process.pid)
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with suppress(BrokenPipeError):  # what it was still to read
                pipe.close()


def require_success(process: Process, stderr: IO[bytes], writes_in: Path | None = None) -> None:
    if process.returncode == 0:
        return
    command: list[str | Path] = list(process.args)  # type: ignore[arg-type]
    said, last = text_of(stderr), last_line(stderr)
    name = " ".join(Path(part).name for part in command[:2]) if "python" in str(command[0]) else Path(command[0]).name
    if "No space left" in said or (writes_in and is_full(writes_in)):
        raise MachineError(f"{name} failed because the disk of {writes_in} is full; free some space and run again")
    if why := next((why for sign, why in MACHINE.items() if sign in said), None):
        raise MachineError(f"{name} failed {why}")
    if why := ENDED.get(-process.returncode):
        raise MachineError(f"{name} {why}")
    if -process.returncode in STOPS:
        raise TryLater(f"{name} was stopped by {signal.Signals(-process.returncode).name}; run again")
    raise CheckFailed(f"{name} failed with exit code {process.returncode}; its last line: {last}")


def last_line(stderr: IO[bytes]) -> str:
    return next((line.strip() for line in reversed(text_of(stderr).splitlines()) if line.strip()), "it said nothing")


def text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
