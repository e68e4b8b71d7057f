"""One worker at a time on a run, wherever it was started: runs/<run_id>/LEASE.json in the output names the holder and
is renewed while it works. It saves work; what guards a release is that its manifest can be written only once.

No two clocks are compared: a lease has expired when somebody has watched it unchanged, on the clock of the watcher's
own machine, for as long as it says that it lasts. (As in Gray and Cheriton, "Leases", SOSP 1989.)
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from pipeline import process
from pipeline.errors import DataError, InputMissing, QuotesmithError, TryLater
from pipeline.foreign_text import printable
from pipeline.manifest import as_json
from pipeline.retrying import within
from pipeline.storage import Store

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
POLL_SECONDS = 2.0  # while waiting for another holder
ATTEMPTS = 20  # at a lease that seems to be neither there nor absent
RENEWALS = 3  # within the time of a lease
RELEASE_SECONDS = 3.0  # a grace period must be enough for it; after that the lease is left to expire
LONGEST_SECONDS = 3600.0  # that a lease of this program lasts
SKEW_SECONDS = 5.0  # between two clocks that are both right
NAME_LENGTH = 100  # characters of a host's name


def lease_name(run_id: str) -> str:
    return f"runs/{run_id}/LEASE.json"


@dataclass(frozen=True)
class Holder:
    """What a LEASE.json says."""

    holder: str
    seconds: float
    until: float  # by the holder's clock, in seconds since 1970: a hint only
    since: str
    process: dict[str, Any]

    @classmethod
    def parsed(cls, data: bytes, seconds: float) -> Holder:
        """A file that is damaged or somebody else's belongs to nobody known, and expires after `seconds`."""
        try:
            content = json.loads(data)
            lasts, until = float(content["seconds"]), float(content["until"])
            if not 0 <= lasts <= LONGEST_SECONDS or not math.isfinite(until):
                raise ValueError
            return cls(
                str(content["holder"]),
                lasts,
                until,
                printable(content["since"], NAME_LENGTH),
                dict(content["process"]),
            )
        except (ValueError, OverflowError, KeyError, TypeError, RecursionError):
            return cls("", seconds, 0.0, "an unknown time", {})

    def __str__(self) -> str:
        pid, host = (printable(self.process.get(key, "unknown"), NAME_LENGTH) for key in ("pid", "host"))
        return f"process {pid} on {host}"


class Watch:
    """What was seen of somebody's lease, on the clock of this machine."""

    def __init__(self) -> None:
        self.holder: Holder | None = None
        self.version = ""
        self.since = 0.0
        self.changes = -1

    def see(self, version: str, holder: Holder | None) -> None:
        if holder:  # else it was removed at this moment
            self.version, self.holder, self.since = version, holder, time.monotonic()
            self.changes += 1

    @property
    def is_over(self) -> bool:
        holder = self.holder
        return holder is not None and (
            process.is_gone(holder.process) or time.monotonic() - self.since >= holder.seconds
        )

    @property
    def seems_dead(self) -> bool:
        """Not renewed before our eyes, and over by our clock, or longer to go than it lasts: worth watching. Then the
        holder's clock is not like ours, so that it may have died long ago."""
        if self.holder is None or self.changes:
            return False
        return not 0 <= self.holder.until - time.time() <= self.holder.seconds + SKEW_SECONDS


class Lease:
    """Held from `acquire` to `release`, renewed by a thread of its own."""

    def __init__(self, store: Store, run_id: str, seconds: float) -> None:
        self.store, self.run_id, self.seconds = store, run_id, seconds
        self.name = lease_name(run_id)
        self.id = uuid.uuid4().hex
        self.since = timestamp(time.time())
        self.renewals = 0
        self.overtaken: Holder | None = None
        self._held_until = 0.0  # on the clock of time.monotonic
        self._busy = threading.Lock()
        self._ended = threading.Event()

    def acquire(self, wait_seconds: float) -> None:
        """Hold the lease; TryLater if another start of the run still holds it after `wait_seconds`.

        On the holder's own machine it is seen at once that it has died. From elsewhere its lease must be watched for
        its full time; that is done for `wait_seconds` at most, but always where by this clock no living holder would
        have written it.
        """
        end = time.monotonic() + wait_seconds
        watch = Watch()
        attempts = 0
        while not self._take(watch):
            attempts += 1
            if watch.holder is None and attempts >= ATTEMPTS and time.monotonic() >= end:
                raise TryLater(self._unclear())
            if watch.holder and time.monotonic() >= end and not watch.seems_dead:
                raise TryLater(
                    f"run {self.run_id} is being done by {watch.holder} since {watch.holder.since}, which holds it "
                    f"until {timestamp(watch.holder.until)} and longer while it lives; wait for it, or set "
                    "lease.wait_seconds"
                )
            time.sleep(min(POLL_SECONDS, self.seconds / 10))
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def confirm(self) -> None:
        """Renew now; TryLater if somebody else has taken over, or it was given back. What comes next is done within
        the lease's time."""
        with self._busy:
            if self._ended.is_set():
                raise TryLater(f"run {self.run_id} was given back by this process, which ends")
            self._renew()

    @property
    def is_held(self) -> bool:
        """As far as this process knows, without asking."""
        return not self.overtaken and time.monotonic() < self._held_until

    def release(self) -> None:
        """End renewing, and remove the lease if it is surely this one's; else it expires. Raises nothing."""
        self._ended.set()
        if not self._busy.acquire(timeout=RELEASE_SECONDS):  # a renewal hangs in the network
            return
        try:
            if self.is_held:
                within(self._remove, RELEASE_SECONDS, f"{self.store.uri}/{self.name}")
        except QuotesmithError as e:
            log.warning("lease: not removed, it expires within %.0f s: %s", self.seconds, e)
        finally:
            self._held_until = 0.0
            self._busy.release()

    def _take(self, watch: Watch) -> bool:
        found = self.store.stat(self.name)
        if found is None:
            return self._write(None)
        if found.version != watch.version:
            watch.see(found.version, self._read())
        if watch.holder is None or not (watch.holder.holder == self.id or watch.is_over):
            return False
        log.info("lease: run %s is taken over from %s", self.run_id, watch.holder)
        return self._write(found.version)

    def _remove(self) -> None:
        holder = self._read()
        if holder and holder.holder == self.id:
            self.store.remove(self.name)

    def _keep(self) -> None:
        while not self._ended.wait(self.seconds / RENEWALS):
            with self._busy:
                if self._ended.is_set():
                    return
                try:
                    self._renew()
                except TryLater as e:
                    log.warning("lease: %s", e)
                    if self.overtaken:
                        return
                except QuotesmithError as e:
                    log.warning("lease: not renewed: %s", e)

    def _renew(self) -> None:
        for _ in range(ATTEMPTS):
            if self.overtaken:
                break
            found = self.store.stat(self.name)
            holder = self._read() if found else None
            # Removed by hand, or late, by an earlier holder: nobody's, so it is taken again.
            if holder and holder.holder != self.id:
                self.overtaken = holder
            elif self._write(found.version if found else None):
                return
        if not self.overtaken:
            raise TryLater(self._unclear())
        raise TryLater(
            f"run {self.run_id} was taken over by {self.overtaken} at {self.overtaken.since}, because this process had "
            "not renewed its lease in time; nothing of this run is published from here, wait for the other"
        )

    def _unclear(self) -> str:
        return (
            f"{self.store.uri}/{self.name} can neither be read nor written, though nobody seems to hold it; look what "
            "is there, or try again"
        )

    def _write(self, expected_version: str | None) -> bool:
        """Every content is new, so that even where a version is a hash of the content, no version comes twice."""
        self.renewals += 1
        written = time.monotonic()
        content = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "holder": self.id,
            "renewal": self.renewals,
            "since": self.since,
            "seconds": self.seconds,
            "until": time.time() + self.seconds,
            "process": process.identity(),
        }
        if not self.store.compare_and_swap(self.name, as_json(content), expected_version):
            return False
        self._held_until = written + self.seconds
        return True

    def _read(self) -> Holder | None:
        try:
            return Holder.parsed(self.store.read(self.name), self.seconds)
        except InputMissing:
            return None
        except DataError:  # larger than any of ours
            return Holder.parsed(b"", self.seconds)


def timestamp(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "an unknown time"
