"""A work folder serves one job at a time: another would empty the folder of the stage that both are in."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import process, signals
from pipeline.disk import as_machine_error
from pipeline.errors import ConfigError, NotAllowed, TryLater
from pipeline.storage.local import translated

LOCK = "IN_USE"
POLL_SECONDS = 0.5


def check_work_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError as e:
        if e.errno != errno.EROFS and (error := as_machine_error(e, path)):  # mounted so, and not by a failure
            raise error from e
        kind = ConfigError if isinstance(e, FileExistsError | NotADirectoryError) else NotAllowed
        raise kind(f"work_dir {path} cannot be made ({e.strerror}); choose a folder that can be written") from e
    if not writable:
        raise NotAllowed(f"work_dir {path} cannot be written; choose a folder that can")


@contextmanager
def alone_in(folder: Path, wait_seconds: float) -> Iterator[None]:
    """Raises `TryLater` if another job is still in `folder` after `wait_seconds`.

    The lock is the system's and ends with its process, however that ends; the file only carries it. On file systems
    that cannot lock (some network drives) nobody is kept out.
    """
    path, end = folder / LOCK, time.monotonic() + wait_seconds
    descriptor = None
    try:
        with translated(path):
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                with signals.untorn():
                    descriptor = locked(path)
                if descriptor is not None:
                    break
                if time.monotonic() >= end:
                    raise TryLater(
                        f"work_dir {folder} is in use by {owner(path)}; wait for it, set lease.wait_seconds, or choose "
                        "another work_dir"
                    )
                time.sleep(POLL_SECONDS)
        sign(descriptor)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()  # before the lock is given up: after that it can be somebody else's
            os.close(descriptor)


def locked(path: Path) -> int | None:
    """The open, locked file of that name; None while another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            return descriptor
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)  # its last owner removed it between the two calls


def sign(descriptor: int) -> None:
    """For the message to the next; on a full disk nobody is told who."""
    with suppress(OSError):
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {process.identity()['host']}".encode())


def owner(path: Path) -> str:
    try:
        return path.read_text() or "another process"
    except OSError:
        return "another process"
