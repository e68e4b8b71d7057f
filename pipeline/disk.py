"""A disk that is full or fails, told from other errors whichever library met it."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import MachineError, QuotesmithError

FULL = (errno.ENOSPC, errno.EDQUOT)
FAILING = (errno.EIO,)
LEAST_FREE_BYTES = 1 << 20  # with less than this left, what failed while writing failed for lack of disk
IN_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers have exceptions of their own
# torch.save keeps no number: its own writing, what it checks afterwards, and C++'s closing of the file.
IN_TORCH = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")


def number_of(error: BaseException) -> int | None:
    """The errno behind an exception."""
    if isinstance(error, OSError):
        return error.errno
    if found := IN_RUST.search(str(error)):
        return int(found[1])
    return errno.EIO if any(sign in str(error) for sign in IN_TORCH) else None


def is_full(folder: Path, error: BaseException | None = None) -> bool:
    """Whether the disk of `folder` has no room, or `error` says so."""
    return (error is not None and number_of(error) in FULL) or shutil.disk_usage(folder).free < LEAST_FREE_BYTES


def as_machine_error(error: BaseException, where: object) -> MachineError | None:
    """What to raise instead of `error`; None where it is not the disk's."""
    number = number_of(error)
    if number in FULL:
        return MachineError(f"the disk is full ({where}); free space and run again")
    if number in FAILING:
        return MachineError(f"the disk failed ({where}): input/output error; check it, or run again on another machine")
    return None


@contextmanager
def errors_translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except QuotesmithError:
        raise
    except Exception as e:
        if error := as_machine_error(e, folder):
            raise error from e
        raise
