"""A bucket in memory whose requests fail by a seeded schedule, as networks and services do."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import retrying
from pipeline.bucket import Body, Overtaken, Page, Report
from pipeline.errors import InputMissing, ServiceUnavailable, TryLater
from pipeline.retrying import Deadline
from pipeline.storage import Crc32c, Stat

TORN = ("cut", "short", "flipped")
LONGEST_STREAK = 3  # of faults, so that the budget of a call is enough


class Killed(BaseException):
    """The process is gone."""


class Service:
    """What the requests change: objects and, on their way, writes that land late or twice."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.writes = 0
        self.late: list[tuple[str, bytes, str | None]] = []
        self.lock = threading.RLock()

    def write(self, name: str, data: bytes, expected: str | None) -> bool:
        with self.lock:
            found = self.objects.get(name)
            if expected != (str(found[1]) if found else None):
                return False
            self.writes += 1
            self.objects[name] = (data, self.writes)
            return True


class FaultyRequests:
    """`bucket.Requests`. `faults` says what can go wrong, `rate` how often; after `ends_after` requests the network
    is gone for good (`end` is raised)."""

    uri = "mem://bucket"

    def __init__(
        self,
        service: Service,
        seed: int,
        *,
        rate: float = 0.0,
        faults: tuple[str, ...] = (),
        ends_after: int | None = None,
        end: type[BaseException] = ServiceUnavailable,
        checksums: bool = True,
    ) -> None:
        self.service, self.rate, self.faults = service, rate, faults
        self.random = random.Random(seed)
        self.left, self.end, self.checksums = ends_after, end, checksums
        self.streak = self.burst = 0
        self.happened: list[str] = []

    def head(self, name: str) -> Stat | None:
        with self._fault():
            found = self.service.objects.get(name)
            return found and self._stat(*found)

    def fetch(self, name: str, found: Stat, start: int, take: Callable[[bytes], object]) -> None:
        with self._fault() as fault:
            data, version = self.service.objects.get(name, (b"", 0))
            if not version:
                raise InputMissing(f"{name} is gone")
            if str(version) != found.version:
                raise Overtaken(f"{name} is another one now")
            part = data[start:]
            if fault in TORN:
                part = torn(part, fault, self.random)
            half = len(part) // 2
            for piece in (part[:half], part[half:]):
                take(piece)
            if fault == "cut":
                raise ServiceUnavailable("connection reset")

    def send(self, name: str, data: Body, expected: str | None, deadline: Deadline, report: Report) -> bool:
        content = data.read_bytes() if isinstance(data, Path) else data
        with self._fault() as fault:
            if fault == "late":  # the client gives it up, a router has not
                self.service.late.append((name, content, expected))
                raise ServiceUnavailable("timed out")
            done = self.service.write(name, content, expected)
            report(len(content))
            if fault == "twice":
                return self.service.write(name, content, expected)
            return done

    def page(self, prefix: str, token: str | None, limit: int) -> Page:
        with self._fault():
            names = sorted(name for name in self.service.objects if name.startswith(prefix) and name > (token or ""))
            page = [(name, len(self.service.objects[name][0])) for name in names[:limit]]
            return page, page[-1][0] if names[limit:] else None

    def remove(self, name: str, version: str) -> None:
        with self._fault():
            self.service.objects.pop(name, None)

    def _stat(self, data: bytes, version: int) -> Stat:
        checksum = Crc32c()
        checksum.update(data)
        return Stat(len(data), str(version), crc32c=checksum.text() if self.checksums else None)

    @contextmanager
    def _fault(self) -> Iterator[str]:
        """What goes wrong with this request, "" for nothing."""
        with self.service.lock:
            for write in self.service.late:
                self.service.write(*write)
            self.service.late.clear()
            fault = self._next()
        if fault == "busy":
            raise ServiceUnavailable("503 slow down")
        if fault == "conflict":
            raise TryLater("409 conflict")
        if fault == "delay":
            retrying.time.sleep(self.random.uniform(0, 1))
        with self.service.lock:
            yield fault
        if fault == "lost":
            raise ServiceUnavailable("connection reset")

    def _next(self) -> str:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise self.end("gone")
        fault = ""
        if self.streak < LONGEST_STREAK and self.faults:
            if self.burst:
                self.burst -= 1
                fault = "busy"
            elif self.random.random() < self.rate:
                fault = self.random.choice(self.faults)
                self.burst = self.random.randrange(LONGEST_STREAK) if fault == "busy" else 0
        self.streak = self.streak + 1 if fault else 0
        if fault:
            self.happened.append(fault)
        return fault


def torn(part: bytes, fault: str, chance: random.Random) -> bytes:
    if fault == "flipped" and part:
        at = chance.randrange(len(part))
        return part[:at] + bytes([part[at] ^ 1]) + part[at + 1 :]
    return part[: chance.randrange(len(part) + 1)]


def simulate_time(patch: pytest.MonkeyPatch) -> None:
    """Pauses pass at once and calls stay in their thread, so that a seed means the same every time.

    Only in the thread that asks for it: one that an earlier test left behind must not move its clock.
    """
    mine, now, really_within = threading.get_ident(), 0.0, retrying.within

    def monotonic() -> float:
        return now if threading.get_ident() == mine else time.monotonic()

    def sleep(seconds: float) -> None:
        nonlocal now
        if threading.get_ident() == mine:
            now += seconds
        else:
            time.sleep(seconds)

    def within(act: Callable[[], Any], seconds: float, where: str) -> Any:
        return act() if threading.get_ident() == mine else really_within(act, seconds, where)

    patch.setattr(retrying, "time", SimpleNamespace(monotonic=monotonic, sleep=sleep))
    patch.setattr(retrying, "within", within)
