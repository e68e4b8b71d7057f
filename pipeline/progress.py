"""Progress bars for people on a terminal; nowhere else, and not between JSON lines. Transfers are logged too."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from tqdm import tqdm

from pipeline import logs

log = logging.getLogger(__name__)

Item = TypeVar("Item")

LOGGED_BYTES = 5_000_000  # smaller transfers are over before a line is read
LOGGED_SECONDS = 30.0  # between two lines about one transfer


def wanted() -> bool:
    return logs.on_terminal() and not logs.as_json()


def bar(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """`items`, with a bar called `what` while they are walked through; it vanishes at the end."""
    yield from tqdm(items, desc=what, total=total, leave=False, disable=not wanted())


@contextmanager
def transfer(what: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """A function to be told how many bytes are through, which can go back when a part is sent again.

    From `LOGGED_BYTES` on there is a bar or, where bars are not wanted, a line now and then; and a last line with
    MB and MB/s, if all of it went through.
    """
    if size_bytes < LOGGED_BYTES:
        yield lambda position: None
        return
    started = told = time.monotonic()
    through = 0
    with tqdm(total=size_bytes, desc=what, unit="B", unit_scale=True, leave=False, disable=not wanted()) as shown:

        def report(position: int) -> None:
            nonlocal told, through
            through = position
            shown.update(position - shown.n)
            now = time.monotonic()
            if shown.disable and now - told >= LOGGED_SECONDS:
                told = now
                log.info("%s: %s of %.1f MB", what, speed(position, now - started), size_bytes / 1e6)

        yield report
    if through < size_bytes:
        return  # it was not wanted: the object is there
    log.info("%s: %s", what, speed(size_bytes, time.monotonic() - started))


def speed(size_bytes: int, seconds: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB in {seconds:.1f} s, {size_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s"


class Watched(io.RawIOBase):
    """Bytes or a file to be read by an SDK, which reports how far it has been read; a part of it with `start`
    and `length`."""

    def __init__(
        self, data: bytes | Path, report: Callable[[int], object], start: int = 0, length: int | None = None
    ) -> None:
        self.file: IO[bytes] = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")
        whole = self.file.seek(0, io.SEEK_END)
        self.start, self.size = start, whole - start if length is None else min(length, whole - start)
        self.report = report
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell() - self.start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.size}[whence]
        self.file.seek(self.start + base + offset)
        return self.tell()

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.tell())
        data = self.file.read(left if size is None or size < 0 else min(size, left))
        self.report(self.start + self.tell())
        return data

    def __len__(self) -> int:
        return self.size

    def close(self) -> None:
        self.file.close()
        super().close()
