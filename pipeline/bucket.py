"""A store in a bucket, whatever the service: checksums, tries and preconditions around the handful of requests that
a scheme's file knows how to make (`storage/gs.py`, `storage/s3.py`)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Protocol, TypeVar

from pipeline import retrying
from pipeline.arrival import Arrival
from pipeline.errors import (
    ConfigError,
    InputMissing,
    NotAllowed,
    QuotesmithError,
    ServiceUnavailable,
    TransferError,
    TryLater,
)
from pipeline.progress import transfer
from pipeline.retrying import Deadline, retry, try_seconds
from pipeline.storage import (
    PROBE,
    Stat,
    check_listed,
    check_name,
    check_prefix,
    check_readable,
    crc32c_of,
    is_abandoned_probe,
    probe_name,
)
from pipeline.storage.local import sync, written
from pipeline.storage.local import translated as disk_errors_translated

Result = TypeVar("Result")

WRITE_ATTEMPTS = 5  # when somebody else writes the same object meanwhile
PAGE_OBJECTS = 1000
BUSY = (408, 429)
# What an SDK trips over when no bucket answers, but a proxy with its page to log in, say, or a redirect to itself.
NO_ANSWER = (AttributeError, LookupError, RecursionError, TypeError, ValueError)

Body = bytes | Path
Page = tuple[list[tuple[str, int]], str | None]  # (name, bytes) of objects, and the token of the next page
Report = Callable[[int], object]  # told how many bytes are through


class Overtaken(TransferError):
    """The object is no longer the one that was looked up."""


class Requests(Protocol):
    """What a scheme can do. Each is one try that raises our errors; those of `retrying.PASSING` are tried again."""

    uri: str

    def head(self, name: str) -> Stat | None: ...

    def fetch(self, name: str, found: Stat, start: int, take: Callable[[bytes], object]) -> None:
        """Hand over the bytes of just that version from `start` on; Overtaken if there is another one now."""

    def send(self, name: str, data: Body, expected: str | None, deadline: Deadline, report: Report) -> bool:
        """Write if the object has the version `expected` (None: if there is none); False if it has not."""

    def page(self, prefix: str, token: str | None, limit: int) -> Page:
        """(name, bytes) of `limit` objects at most, and the token of the next page; None: that was the last."""

    def remove(self, name: str, version: str) -> None:
        """Nothing happens if it is gone already."""


class BucketStore:
    """`storage.Store` over `requests`."""

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        self.uri = requests.uri

    def stat(self, name: str) -> Stat | None:
        return self._head(name, Deadline())

    def get(self, name: str, to: Path) -> None:
        found = self._found(name)
        with disk_errors_translated(to), written(to) as temporary:
            with temporary.open("wb") as file, transfer(f"download {self._uri(name)}", found.size) as report:
                self._download(name, found, file, report)
            sync(temporary)
            temporary.replace(to)

    def read(self, name: str) -> bytes:
        file, found = io.BytesIO(), self._found(name)
        check_readable(found.size, self._uri(name))
        self._download(name, found, file, lambda _: None)
        return file.getvalue()

    def put(self, name: str, path: Path) -> None:
        with disk_errors_translated(path):
            size, crc32c = path.stat().st_size, crc32c_of(path)
        deadline = Deadline(size)
        for _ in range(WRITE_ATTEMPTS):
            found = self._head(name, deadline)
            if found and (found.size, found.crc32c) == (size, crc32c):
                return
            if self._send(name, path, found.version if found else None, deadline):
                return
        raise TryLater(f"{self._uri(name)} keeps being written by somebody else; stop the other run or wait")

    def put_if_absent(self, name: str, data: Body) -> bool:
        return self._send(name, data, None)

    def compare_and_swap(self, name: str, data: bytes, expected_version: str | None) -> bool:
        if self._send(name, data, expected_version):
            return True
        return self._reads(name, data)  # what lies between here and the server may have repeated this write unseen

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        check_prefix(prefix)
        token: str | None = None
        while True:
            last = token
            page, token = self._page(prefix, last)
            if token and token == last:
                raise no_bucket(self._uri(prefix), "a list without an end")
            for name, size in page:
                if not name.endswith("/"):  # the consoles' stand-ins for folders
                    yield check_listed(name, self.uri), size
            if token is None:
                return

    def remove(self, name: str) -> None:
        check_name(name)

        def look_and_remove() -> None:
            found = self.requests.head(name)
            if found:  # else it is gone, perhaps by a try whose response was lost
                self.requests.remove(name, found.version)

        self._retry(look_and_remove, Deadline(), name)

    def clear_up(self, folder: str) -> None:
        """Only a probe can be left: an upload that was cut leaves no object."""
        for name, _ in self.list(PROBE):
            if is_abandoned_probe(name):
                self.remove(name)

    def probe(self) -> None:
        name = probe_name()
        self.put_if_absent(name, b"probe")
        try:
            if self.read(name) != b"probe":
                raise TransferError(f"{self.uri} did not give back what was written to it; try again")
        finally:
            self.remove(name)

    def _head(self, name: str, deadline: Deadline) -> Stat | None:
        check_name(name)

        def head() -> Stat | None:
            found = self.requests.head(name)
            if found and not is_sensible(found):
                raise no_bucket(self._uri(name), "an object without a size or a version")
            return found

        return self._retry(head, deadline, name)

    def _found(self, name: str) -> Stat:
        found = self._head(name, Deadline())
        if found is None:
            raise InputMissing(f"{self._uri(name)} does not exist; check the bucket and the name")
        return found

    def _page(self, prefix: str, token: str | None) -> Page:
        return self._retry(lambda: self.requests.page(prefix, token, PAGE_OBJECTS), Deadline(), prefix)

    def _send(self, name: str, data: Body, expected: str | None, deadline: Deadline | None = None) -> bool:
        check_name(name)
        with disk_errors_translated(data if isinstance(data, Path) else Path(name)):
            return self._send_all(name, data, expected, deadline)

    def _send_all(self, name: str, data: Body, expected: str | None, deadline: Deadline | None) -> bool:
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        limit = deadline or Deadline(size)
        with transfer(f"upload {self._uri(name)}", size) as report:
            tries = 0

            def send() -> bool:
                nonlocal tries
                tries = mine = tries + 1

                def told(position: int) -> None:
                    if mine < tries or not limit.left():  # nobody waits for this try any more
                        raise ServiceUnavailable(f"{self._uri(name)} was not done in time; check the network")
                    report(position)

                return self.requests.send(name, data, expected, limit, told)

            # Pieces are tried again one by one, in the scheme's file.
            one_try = math.inf if size > retrying.PIECE_BYTES else try_seconds(size)
            # After a try that broke, what stands there can be what it wrote.
            return retry(send, limit, self._uri(name), one_try) or (tries > 1 and self._holds(name, data))

    def _holds(self, name: str, data: Body) -> bool:
        if isinstance(data, bytes):
            return self._reads(name, data)
        found = self._head(name, Deadline())
        return found is not None and (found.size, found.crc32c) == (data.stat().st_size, crc32c_of(data))

    def _reads(self, name: str, data: bytes) -> bool:
        try:
            return self.read(name) == data
        except InputMissing:
            return False

    def _download(self, name: str, found: Stat, file: IO[bytes], report: Report) -> None:
        arrival = Arrival(self._uri(name), found, file, report)

        def go_on() -> None:
            number = arrival.begin()
            try:
                if arrival.size < arrival.found.size:
                    self.requests.fetch(name, arrival.found, arrival.size, partial(arrival.take, number))
                arrival.check(number)
            except TransferError as e:
                newer = self.requests.head(name)  # what came can be of another version, where a server forgets which
                if newer is None:
                    raise InputMissing(f"{self._uri(name)} was deleted while it was read; start again") from None
                if isinstance(e, Overtaken) or newer.version != arrival.found.version:
                    arrival.restart(number, newer)
                raise

        retry(go_on, Deadline(found.size), self._uri(name), try_seconds(found.size))

    def _retry(self, act: Callable[[], Result], deadline: Deadline, name: str) -> Result:
        return retry(act, deadline, self._uri(name), try_seconds())

    def _uri(self, name: str) -> str:
        return f"{self.uri}/{name}"


def verdict(code: int) -> tuple[type[QuotesmithError], str]:
    """The error behind an HTTP status, and what to do."""
    if code in (401, 403):
        return NotAllowed, "give this job's account the right to list, read, create and delete objects there"
    if code == 404:
        return InputMissing, "check the bucket and the name"
    if code == 409:
        return TryLater, "somebody else writes it at this moment; try again"
    if code == 412:
        return Overtaken, "it changed meanwhile; try again"
    if code in BUSY or code >= 500:
        return ServiceUnavailable, "try later"
    return ConfigError, "the server refuses the request; check the bucket and the name"


def is_sensible(found: Stat) -> bool:
    """Whether a server that says this of an object can have it."""
    return isinstance(found.size, int) and found.size >= 0 and found.version not in ("", "None")


def no_bucket(uri: str, why: object) -> ServiceUnavailable:
    """For answers that no service gives: whatever speaks there may be in the way for a while only."""
    said = f"{type(why).__name__} {why}" if isinstance(why, Exception) else why
    return ServiceUnavailable(
        f"{uri}: what answers there is no bucket ({first_line(said)}); check the endpoint, and proxies on the way"
    )


def first_line(message: object) -> str:
    return str(message).strip().split("\n")[0][:300]
