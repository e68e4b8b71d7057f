"""What the machine is to blame for, its disk above all, told from other errors whichever library met it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import MachineError, NotAllowed, QuotesmithError

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_SAID = "the disk is full ({where}); free space and run again"
FILES_SAID = "too many files are open ({where}); raise the limit (ulimit -n), or run again with fewer jobs beside it"
SAID = {
    **dict.fromkeys(FULL, FULL_SAID),
    errno.EIO: "the disk failed ({where}): input/output error; check it, or run again on another machine",
    errno.EROFS: "the disk is read-only now ({where}), as a failing one is made; check it, or run again elsewhere",
    errno.EFBIG: "a file would be larger than is allowed ({where}); raise the limit (ulimit -f), or use another disk",
    errno.ENOTCONN: "the network drive is gone ({where}); mount it anew and run again",
    errno.ESTALE: "the network drive lost a file ({where}); check the drive and run again",
    errno.ENOMEM: "memory ran out ({where}); run again with more memory",
    errno.EAGAIN: "no process or thread can be started ({where}); raise the limit (ulimit -u, pids.max), run again",
    errno.EMFILE: FILES_SAID,
    errno.ENFILE: FILES_SAID,
}
NO_TEMPORARY = "No usable temporary directory"  # Python's tempfile, whose number says that a file is missing
TEMPORARY_SAID = "no folder for temporary files can be written; set TMPDIR to one with room, or mount one at /tmp"
LEAST_FREE_BYTES = 1 << 20  # with less than this left, what failed while writing failed for lack of disk
IN_TORCH = re.compile(r"failed with strerror: (.+)")  # torch.save where it cannot open its file
IN_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers have exceptions of their own
NO_NUMBER = {
    # torch.save: its own writing, what it checks afterwards, and C++'s closing of the file
    **dict.fromkeys(("PytorchStreamWriter failed", "unexpected pos", "iostream error"), errno.EIO),
    "can't start new thread": errno.EAGAIN,
    "failed to map segment from shared object": errno.ENOMEM,  # the loader, under a limit (ulimit -v)
}


def number_of(error: BaseException) -> int | None:
    """The errno behind an exception."""
    if isinstance(error, OSError):
        return error.errno
    if found := IN_RUST.search(str(error)):
        return int(found[1])
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if found := IN_TORCH.search(str(error)):
        return next((number for number in SAID if os.strerror(number) == found[1]), None)
    return next((number for sign, number in NO_NUMBER.items() if sign in str(error)), None)


def is_full(folder: Path, error: BaseException | None = None) -> bool:
    """Whether the disk of `folder` has no room, or `error` says so."""
    return (error is not None and number_of(error) in FULL) or shutil.disk_usage(folder).free < LEAST_FREE_BYTES


def as_machine_error(error: BaseException, where: object) -> MachineError | None:
    """What to raise instead of `error`; None where the machine is not to blame."""
    if isinstance(error, FileNotFoundError) and NO_TEMPORARY in str(error):
        return MachineError(TEMPORARY_SAID)
    said = SAID.get(number_of(error) or 0)
    return MachineError(said.format(where=where)) if said else None


@contextmanager
def errors_translated(folder: Path, needed: Collection[Path] = ()) -> Iterator[None]:
    """Raises `MachineError` for what is to blame on the disk of `folder`, and for whatever fails while one of the
    folders `needed`, as they are then, is gone."""
    try:
        yield
    except Exception as e:
        if gone := next((path for path in needed if not path.exists()), None):
            raise MachineError(
                f"{gone} was removed while the job needed it; run again, and let nothing clear the work folder"
            ) from e
        if not isinstance(e, QuotesmithError) and (error := as_machine_error(e, folder)):
            raise error from e
        raise


def clear(path: Path) -> None:
    """Makes way for a new folder at `path`: what is there goes, of a link only the link.

    Raises `NotAllowed` for what cannot go.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as e:
        raise as_machine_error(e, path) or NotAllowed(
            f"{path} is in the way and cannot be removed ({e.strerror}); remove it, or choose another work_dir"
        ) from e
