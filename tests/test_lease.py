from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from pipeline import lease as module
from pipeline import process, retrying, storage
from pipeline.bucket import BucketStore
from pipeline.errors import ConfigError, ServiceUnavailable, TargetTaken, TryLater
from pipeline.lease import Holder, Lease, lease_name
from pipeline.manifest import manifest_name
from pipeline.publish import publish, verify
from pipeline.storage import Store, open_store
from tests.faulty_requests import FaultyRequests, Service

dead_holder = pytest.mark.fault(
    "leases, failures, checkpoints",
    "a holder that died, and clocks that are wrong",
    "followed when its time is over, never sooner",
)

damaged_record = pytest.mark.fault(
    "leases, failures, checkpoints",
    "a LEASE.json or FAILURE.json that is damaged, absurd or huge",
    "keeps nobody from working",
)

SECONDS = 0.6
NAME = lease_name("run1")
ELSEWHERE = {"host": "another machine", "pid": 7}


@pytest.fixture(params=["local", "memory", "gs", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return BucketStore(FaultyRequests(Service(), 0))
    if request.param == "local":
        return open_store(str(tmp_path / "out"))
    root = request.getfixturevalue({"gs": "gcs_bucket_uri", "s3": "s3_bucket_uri"}[request.param])
    return open_store(f"{root}/out")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def held(store: Store, seconds: float = SECONDS, wait_seconds: float = 0) -> Lease:
    lease = Lease(store, "run1", seconds)
    lease.acquire(wait_seconds)
    return lease


def died(lease: Lease) -> None:
    """Nothing renews or removes it any more."""
    lease._ended.set()


def far_away(patch: pytest.MonkeyPatch) -> None:
    """Nobody can see from here whether a process lives."""
    patch.setattr(process, "identity", lambda: ELSEWHERE)


def test_one_holds_it_and_the_other_is_told_who_and_until_when(store: Store) -> None:
    first = held(store, 60)
    with pytest.raises(
        TryLater, match=rf"done by process {os.getpid()} on .* since 20.*Z, .* until 20.*wait"
    ) as caught:
        held(store)
    assert caught.value.exit_code == 75 and "\n" not in str(caught.value)
    first.release()
    assert store.stat(NAME) is None
    held(store).release()


def test_the_other_waits_and_gets_it_when_it_is_free(store: Store) -> None:
    first = held(store, 60)
    started = time.monotonic()
    threading.Timer(0.3, first.release).start()
    second = held(store, wait_seconds=30)
    assert 0.2 < time.monotonic() - started < 15
    second.release()


def test_it_is_renewed_for_as_long_as_it_is_held(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    far_away(monkeypatch)
    first = held(store, 3)
    with pytest.raises(TryLater):
        held(store, wait_seconds=7)
    first.confirm()
    assert first.is_held and json.loads(store.read(NAME))["renewal"] > 3
    first.release()


def test_a_dead_holders_lease_expires_for_one_that_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    far_away(monkeypatch)
    first = held(store, 3)
    died(first)
    with pytest.raises(TryLater):
        held(store)
    second = held(store, 3, wait_seconds=30)
    first._ended.clear()  # it had only been asleep
    with pytest.raises(TryLater, match="taken over by"):
        first.confirm()
    first.release()
    second.confirm()
    second.release()
    assert store.stat(NAME) is None


@dead_holder
def test_a_lease_that_looks_long_over_is_watched_for_its_full_time_and_then_taken(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    far_away(monkeypatch)
    died(held(local))
    time.sleep(SECONDS + 0.1)
    started = time.monotonic()
    held(local).release()
    assert SECONDS <= time.monotonic() - started < SECONDS + 5


@dead_holder
@pytest.mark.parametrize("ahead_seconds", [-60, 60, 3600 * 1000])
def test_a_dead_holder_whose_clock_was_wrong_is_watched_for_its_full_time_and_then_followed(
    local: Store, ahead_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    far_away(monkeypatch)
    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(module.time, "time", lambda: now() + ahead_seconds)
        died(held(local, 1.5))
    started = time.monotonic()
    held(local).release()
    assert 1.5 <= time.monotonic() - started < 1.5 + 5


@dead_holder
@pytest.mark.parametrize("hours", [-1000, 1000])
def test_a_clock_that_is_wrong_by_weeks_takes_nothing_from_a_living_holder(
    local: Store, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    far_away(monkeypatch)
    first, parsed = held(local, 3), Holder.parsed
    with monkeypatch.context() as patch:
        shift = 3600 * hours
        patch.setattr(Holder, "parsed", lambda *of: replace(parsed(*of), until=parsed(*of).until + shift))
        end = threading.Timer(30, first.release)
        end.start()
        with pytest.raises(TryLater):
            held(local)
        end.cancel()
    first.confirm()
    first.release()


@dead_holder
def test_a_holder_of_this_machine_that_was_killed_is_followed_at_once(local: Store, tmp_path: Path) -> None:
    script = (
        "import sys, time; from pipeline.lease import Lease; from pipeline.storage import open_store;"
        "Lease(open_store(sys.argv[1]), 'run1', 3600).acquire(0); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(TryLater, match=f"process {holder.pid} "):
            held(local)
        holder.kill()
        started = time.monotonic()
        held(local, wait_seconds=30).release()
        assert time.monotonic() - started < 10


def test_a_holder_that_was_overtaken_stops_renewing_and_says_so(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    far_away(monkeypatch)
    first, second = Lease(local, "run1", 3600), Lease(local, "run1", 3600)
    first.acquire(0)
    found = local.stat(NAME)
    assert found and second._write(found.version)
    with pytest.raises(TryLater, match="nothing of this run is published from here"):
        first.confirm()
    assert not first.is_held
    first.release()
    assert json.loads(local.read(NAME))["holder"] == second.id


def test_a_lease_that_was_given_back_is_not_held_and_not_taken_again(local: Store) -> None:
    first = held(local, 3600)
    first.release()
    assert not first.is_held
    with pytest.raises(TryLater, match="given back"):
        first.confirm()
    assert local.stat(NAME) is None


def test_a_lease_that_somebody_removed_is_taken_again(local: Store) -> None:
    first = held(local, 3600)
    local.remove(NAME)
    first.confirm()
    assert json.loads(local.read(NAME))["holder"] == first.id
    first.release()


HUGE = "9" * 400


@damaged_record
@pytest.mark.parametrize(
    ("seconds", "until"),
    [
        *((seconds, "0") for seconds in ("9e99", "-1", "NaN", "Infinity", HUGE)),
        *(("0.3", until) for until in ("9e99", "-9e99", "NaN", "-Infinity", HUGE, '"x"')),
    ],
)
def test_absurd_numbers_in_a_lease_keep_nobody_waiting_for_longer_than_a_lease_lasts(
    local: Store, seconds: str, until: str
) -> None:
    content = f'{{"holder": "x", "seconds": {seconds}, "until": {until}, "since": "", "process": {{}}}}'
    local.put_if_absent(NAME, content.encode())
    started = time.monotonic()
    held(local, 0.3).release()
    assert time.monotonic() - started < 5


@damaged_record
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"holder": 1, "seconds": "x"}', b"[" * 100_000])
def test_a_damaged_lease_belongs_to_nobody_and_expires(local: Store, content: bytes) -> None:
    local.put_if_absent(NAME, content)
    held(local).release()


@damaged_record
def test_a_lease_that_is_larger_than_any_belongs_to_nobody_and_expires(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LARGEST_READ", 1000)
    store.put_if_absent(NAME, b"x" * 1001)
    held(store).release()


@pytest.mark.parametrize("kind", ["folder", "dangling"])
def test_what_stands_in_the_place_of_a_lease_and_is_no_file_is_said_at_once(
    local: Store, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "out" / NAME
    path.parent.mkdir(parents=True)
    path.mkdir() if kind == "folder" else path.symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"LEASE\.json is a folder, a link to nothing"):
        held(local)


class Unclear:
    """A store that finds nothing, and something where it writes: a cache that lags behind, for instance."""

    uri = "mem://bucket"

    def stat(self, name: str) -> None:
        return None

    def compare_and_swap(self, name: str, data: bytes, expected_version: str | None) -> bool:
        return False


def test_a_lease_that_is_neither_there_nor_absent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    lease = Lease(cast(Store, Unclear()), "run1", SECONDS)
    for act in (partial(lease.acquire, 0), lease.confirm):
        with pytest.raises(TryLater, match=r"LEASE\.json can neither be read nor written"):
            act()


def test_what_a_lease_says_of_its_holder_cannot_break_a_message(local: Store) -> None:
    name = "a\n\x1b[2J" + "b" * 10_000
    until = time.time() + 60
    content = {"holder": "x", "seconds": 60, "until": until, "since": name, "process": {"pid": name, "host": name}}
    local.put_if_absent(NAME, json.dumps(content).encode())
    with pytest.raises(TryLater) as caught:
        held(local)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_bucket_that_is_away_for_longer_than_a_lease_lasts_is_survived_if_nobody_took_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrying, "BUDGET_SECONDS", 6.0)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_SECONDS", 1000.0)  # one try
    requests = FaultyRequests(Service(), 0)
    first = held(BucketStore(requests), 1)
    requests.left = 0
    time.sleep(1.5)
    assert not first.is_held
    with pytest.raises(ServiceUnavailable):
        first.confirm()
    requests.left = None
    first.confirm()
    assert first.is_held
    first.release()


def test_releasing_through_a_dead_network_ends_soon_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELEASE_SECONDS", 0.2)
    requests = FaultyRequests(Service(), 0)
    first = held(BucketStore(requests), 3600)
    requests.left = 0
    started = time.monotonic()
    first.release()
    assert time.monotonic() - started < 2


class Worker(threading.Thread):
    """A start of the run that works a little, may lose its network or die on the way, and publishes."""

    def __init__(self, store: Store, files: dict[str, Path], chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.store, self.files = store, files
        self.pauses = [chance.uniform(0, 0.12) for _ in range(3)]
        self.stalls, self.dies = chance.random() < 0.4, chance.random() < 0.3
        self.ending: object = None

    def run(self) -> None:
        lease = Lease(self.store, "run1", 0.15)
        try:
            time.sleep(self.pauses[0])
            lease.acquire(self.pauses[1] * 4)
            if self.stalls:  # suspended: neither renews nor notices
                died(lease)
                time.sleep(0.25)
            time.sleep(self.pauses[2])
            if self.dies:
                died(lease)
                return
            self.ending = publish("out", run_id="run1", name="voice", files=self.files, confirm=lease.confirm)
            lease.release()
        except Exception as e:
            lease.release()
            self.ending = e


@pytest.fixture
def interleaved(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    far_away(monkeypatch)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_SECONDS", 0.002)
    monkeypatch.setattr(retrying, "LONGEST_PAUSE_SECONDS", 0.01)
    yield


@pytest.mark.parametrize("seed", range(24))
def test_whatever_the_timing_there_is_one_manifest_and_it_never_changes(
    seed: int, tmp_path: Path, interleaved: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    service = Service()
    faults = ("lost", "late", "twice", "busy") if seed % 2 else ()
    manifests: set[bytes] = set()
    written = service.write

    def watched(name: str, data: bytes, expected: str | None) -> bool:
        done = written(name, data, expected)
        if done and name == manifest_name("run1"):
            manifests.add(data)
        return done

    monkeypatch.setattr(service, "write", watched)
    stores = [BucketStore(FaultyRequests(service, seed * 10 + i, rate=0.1, faults=faults)) for i in range(3)]
    monkeypatch.setattr("pipeline.publish.open_store", lambda uri: stores[int(threading.current_thread().name)])
    workers = [Worker(store, made(tmp_path / str(i), i), chance) for i, store in enumerate(stores)]
    for number, worker in enumerate(workers):
        worker.name = str(number)
        worker.start()
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
    assert len(manifests) <= 1
    for worker in workers:
        assert not isinstance(worker.ending, Exception) or isinstance(worker.ending, TryLater | TargetTaken)
    if any(worker.ending and not isinstance(worker.ending, Exception) for worker in workers):
        assert len(manifests) == 1
        monkeypatch.setattr("pipeline.publish.open_store", lambda uri: BucketStore(FaultyRequests(service, 0)))
        assert verify("out")


def made(folder: Path, number: int) -> dict[str, Path]:
    """Each worker comes to other weights, as on other hardware."""
    folder.mkdir()
    (folder / "voice-Q2_K.gguf").write_bytes(b"weights %d" % number)
    return {"voice-Q2_K.gguf": folder / "voice-Q2_K.gguf"}


def test_a_manifest_is_written_only_while_the_lease_is_held(local: Store, tmp_path: Path) -> None:
    first, second = Lease(local, "run1", 3600), Lease(local, "run1", 3600)
    first.acquire(0)
    found = local.stat(NAME)
    assert found and second._write(found.version)
    with pytest.raises(TryLater, match="taken over"):
        publish(str(tmp_path / "out"), run_id="run1", name="v", files=made(tmp_path / "a", 1), confirm=first.confirm)
    assert local.stat(manifest_name("run1")) is None
    publish(str(tmp_path / "out"), run_id="run1", name="v", files=made(tmp_path / "b", 2), confirm=second.confirm)
    assert verify(str(tmp_path / "out"))
