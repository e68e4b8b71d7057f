"""A download as it comes in, over several tries: what is kept, what starts over, and whether it is the object."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from pipeline.errors import TransferError
from pipeline.storage import Crc32c, Stat


class Arrival:
    """The bytes of an object so far; a broken transfer goes on where it ended, a corrupt one starts over.

    Tries are numbered: one that was left behind can still be running, and nothing is taken from it.
    """

    def __init__(self, uri: str, found: Stat, file: IO[bytes], report: Callable[[int], object]) -> None:
        self.uri, self.file, self.report = uri, file, report
        self.number, self.lock = 0, threading.Lock()
        self._empty(found)

    def begin(self) -> int:
        with self.lock:
            self.number += 1
            return self.number

    def take(self, number: int, chunk: bytes) -> None:
        with self._turn(number):
            if self.size + len(chunk) > self.found.size:  # it could fill the disk, or the memory
                self._empty(self.found)
                raise TransferError(f"{self.uri} sent more than its {self.found.size} bytes; try again")
            self.file.write(chunk)
            self.size += len(chunk)
            if self.found.crc32c:
                self.crc32c.update(chunk)
            elif self.found.md5:
                self.md5.update(chunk)
            self.report(self.size)

    def restart(self, number: int, found: Stat) -> None:
        with self._turn(number):
            self._empty(found)

    def check(self, number: int) -> None:
        """TransferError unless these are the object's bytes."""
        with self._turn(number):
            if self.size < self.found.size:
                raise TransferError(f"{self.uri} broke off after {self.size} of {self.found.size} bytes; try again")
            if not self.is_intact():
                self._empty(self.found)
                raise TransferError(f"{self.uri} arrived with a wrong checksum; try again")

    @contextmanager
    def _turn(self, number: int) -> Iterator[None]:
        with self.lock:
            if number != self.number:
                raise TransferError("another try has taken over")
            yield

    def _empty(self, found: Stat) -> None:
        self.found = found
        self.size = 0
        self.crc32c = Crc32c()
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.file.seek(0)
        self.file.truncate()
        self.report(0)

    def is_intact(self) -> bool:
        if self.found.crc32c:
            return self.crc32c.text() == self.found.crc32c
        return not self.found.md5 or base64.b64encode(self.md5.digest()).decode() == self.found.md5
