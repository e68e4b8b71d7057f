"""stdout and stderr: whoever reads them may be gone, or their disk full; an exit code tells of the work."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

STREAMS = ("stdout", "stderr")


def open_closed() -> None:
    """What the caller has closed leads nowhere. Else the next file that is opened would get its number, and what is
    printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in STREAMS:
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115  (for as long as the process lives)


def give_up() -> None:
    """A terminal that is gone refuses whatever is written, a progress bar too; from now on that leads nowhere."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def say(text: str, *, err: bool = False) -> None:
    """For people, beside the work: that they cannot be told changes nothing."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr if err else sys.stdout, flush=True)


def give(text: str) -> None:
    """What a command was asked for. A reader that has gone has read enough; raises `OSError` for a full disk."""
    with suppress(BrokenPipeError):
        print(text, flush=True)


def flush() -> None:
    """What cannot be written is thrown away: the interpreter would try again at its end, and end with 120."""
    for name in STREAMS:
        stream = getattr(sys, name)
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
