"""The store over a bucket that fails by a seeded schedule: the contract, publishing, and single faults."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from pipeline import bucket, errors, retrying
from pipeline import publish as publishing
from pipeline.bucket import BucketStore
from pipeline.publish import publish, verify
from pipeline.storage import Stat, Store, local
from tests import test_storage
from tests.faulty_requests import FaultyRequests, Killed, Service, simulate_time

VISIBLE = ("busy", "lost", "delay", "cut", "short", "flipped", "late", "conflict")
UNSEEN = (*VISIBLE, "twice")  # a write repeated on the way: the client hears only of the second
HUNDREDS = range(10)
GROUP = "storage, by 1,000 seeded schedules"
RELEASED = {"voice-Q2_K.gguf": b"weights " * 20, "metrics.json": b'{"seconds": 1}', "README.md": b"# card"}


@pytest.fixture(autouse=True)
def simulated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_time(monkeypatch)
    # Thousands of small files and syncs take minutes on a busy disk, and no power fails here.
    for module in (bucket, local):
        monkeypatch.setattr(module, "sync", lambda path: None)
    if Path("/dev/shm").is_dir():
        monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")


def contract() -> list[Callable[..., None]]:
    """Every test of the contract that needs only a store and a folder, and no large file."""
    tests = [test for name, test in vars(test_storage).items() if name.startswith("test_") and "large" not in name]
    return [test for test in tests if {"store"} <= {*inspect.signature(test).parameters} <= {"store", "tmp_path"}]


def test_the_contract_is_not_empty() -> None:
    assert len(contract()) >= 7


@pytest.mark.parametrize("hundred", HUNDREDS)
def test_the_contract_holds_over_a_network_that_loses_delays_and_tears(
    hundred: int, tmp_path: Path, record_fault: Callable[..., None]
) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        tests = contract()
        test = tests[seed % len(tests)]
        requests = FaultyRequests(Service(), seed, rate=0.4, faults=VISIBLE)
        folder = tmp_path / str(seed)
        folder.mkdir()
        given = {"store": BucketStore(requests), "tmp_path": folder}
        try:
            test(**{name: given[name] for name in inspect.signature(test).parameters})
        except Exception as e:
            raise AssertionError(f"seed {seed}: {test.__name__} after {requests.happened}") from e
        record_fault(GROUP, "requests lost, repeated, late, cut, flipped", "the storage contract holds")


@pytest.mark.parametrize("hundred", HUNDREDS)
def test_a_release_is_whole_or_absent_whatever_the_network_does(
    hundred: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_fault: Callable[..., None]
) -> None:
    files = made(tmp_path)
    for seed in range(100 * hundred, 100 * hundred + 100):
        service = Service()
        network = {"rate": 0.3, "faults": UNSEEN}
        if seed % 7 == 0:  # a service that knows no checksums; then nobody but TLS can see a flipped bit
            network = {
                "rate": 0.3,
                "faults": tuple(fault for fault in UNSEEN if fault != "flipped"),
                "checksums": False,
            }
        # Every third process is killed and every third network goes away for good, at any request.
        if seed % 3:
            network |= {"ends_after": seed % 41, "end": Killed if seed % 3 == 1 else errors.ServiceUnavailable}
        try:
            run(FaultyRequests(service, seed, **network), files, monkeypatch)
            ended = True
        except (Killed, *retrying.PASSING):
            ended = False
        first = manifest_of(service)
        assert_nothing_is_torn(service, seed)
        assert ended or seed % 3, f"seed {seed}"
        run(FaultyRequests(service, seed + 1, rate=0.3, faults=UNSEEN), files, monkeypatch)
        assert first in (None, manifest_of(service)), f"seed {seed} changed its manifest"
        assert_nothing_is_torn(service, seed)
        assert {name: service.objects[name][0] for name in RELEASED} == RELEASED, f"seed {seed}"
        monkeypatch.setattr(publishing, "open_store", lambda uri, service=service: quiet(service))
        assert len(verify("mem://bucket")) == 6
        end = ("the network stays", "the process is killed", "the network goes away for good")[seed % 3]
        had = "a whole release" if first else "no release"
        record_fault(GROUP, f"the same, and {end}", f"left {had}; the next start published the same")


def made(folder: Path) -> dict[str, Path]:
    for name, content in RELEASED.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in RELEASED}


def run(requests: FaultyRequests, files: dict[str, Path], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publishing, "open_store", lambda uri: BucketStore(requests))
    publish("mem://bucket", run_id="run1", name="voice", files=files)


def quiet(service: Service) -> BucketStore:
    return BucketStore(FaultyRequests(service, 0))


def manifest_of(service: Service) -> bytes | None:
    return service.objects.get("runs/run1/MANIFEST.json", (None, 0))[0]


def assert_nothing_is_torn(service: Service, seed: int) -> None:
    for name, (content, _) in service.objects.items():
        if "/objects/sha256/" in name:
            assert hashlib.sha256(content).hexdigest() == name.rpartition("/")[2], f"seed {seed}: {name}"
        elif name in RELEASED:
            assert content == RELEASED[name], f"seed {seed}: {name}"
            assert manifest_of(service), f"seed {seed}: {name} before the manifest"
    manifest = manifest_of(service)
    for entry in json.loads(manifest)["objects"] if manifest else ():
        assert f"runs/run1/objects/sha256/{entry['sha256']}" in service.objects, f"seed {seed}"


def test_what_takes_time_tells_its_size_and_speed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "file").write_bytes(bytes(6_000_000))
    store = quiet(Service())
    store.put("x", tmp_path / "file")
    store.put("x", tmp_path / "file")  # it is there
    store.get("x", tmp_path / "back")
    assert [message.partition(" MB in")[0] for message in caplog.messages] == [
        "upload mem://bucket/x: 6.0",
        "download mem://bucket/x: 6.0",
    ]


# ---- single faults


class Once(FaultyRequests):
    """The given faults, one a request, then none."""

    def __init__(self, service: Service, *faults: str) -> None:
        super().__init__(service, 1)
        self.next_faults = iter(faults)

    def _next(self) -> str:
        return next(self.next_faults, "")


def test_a_download_that_is_cut_goes_on_where_it_ended(tmp_path: Path) -> None:
    service = Service()
    service.write("x", bytes(range(200)), None)
    starts = []

    class Watching(Once):
        def fetch(self, name: str, found: Stat, start: int, take: Callable[[bytes], object]) -> None:
            starts.append(start)
            super().fetch(name, found, start, take)

    BucketStore(Watching(service, "", "cut", "short", "")).get("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == bytes(range(200))
    assert len(starts) == 3 and starts == sorted(starts) and starts[0] == 0 < starts[1]


def test_a_corrupt_download_starts_over(tmp_path: Path) -> None:
    service = Service()
    service.write("x", bytes(range(200)), None)
    BucketStore(Once(service, "", "flipped", "")).get("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == bytes(range(200))


def test_a_download_that_stays_corrupt_is_a_transfer_error_and_leaves_no_file(tmp_path: Path) -> None:
    service = Service()
    service.write("x", b"data", None)
    with pytest.raises(errors.TransferError, match=r"x arrived with a wrong checksum.*tried \d+ times within 60 s"):
        BucketStore(Once(service, "", *["flipped"] * 100)).get("x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_of_one_version_even_when_the_object_changes_meanwhile(tmp_path: Path) -> None:
    service = Service()
    service.write("x", b"old " * 50, None)

    class Changing(Once):
        def fetch(self, name: str, found: Stat, start: int, take: Callable[[bytes], object]) -> None:
            if start:
                service.write("x", b"new and longer " * 50, found.version)
            super().fetch(name, found, start, take)

    BucketStore(Changing(service, "", "cut")).get("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"new and longer " * 50


@pytest.mark.parametrize("newer", [b"new", b"NEW ", b"new and longer"])
def test_a_server_that_forgets_which_version_was_asked_for_gives_the_newest_in_the_end(
    newer: bytes, tmp_path: Path
) -> None:
    service = Service()
    service.write("x", b"old ", None)

    class Forgetting(Once):
        changed = False

        def fetch(self, name: str, found: Stat, start: int, take: Callable[[bytes], object]) -> None:
            if not self.changed:
                self.changed = service.write("x", newer, found.version)
            data, version = service.objects[name]
            super().fetch(name, self._stat(data, version), start, take)

    store = BucketStore(Forgetting(service))
    store.get("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == newer


def test_an_object_that_is_deleted_while_it_is_read_is_missing_input(tmp_path: Path) -> None:
    service = Service()
    service.write("x", b"data", None)

    class Deleting(Once):
        def fetch(self, name: str, found: Stat, start: int, take: Callable[[bytes], object]) -> None:
            service.objects.clear()
            super().fetch(name, found, start, take)

    with pytest.raises(errors.InputMissing):
        BucketStore(Deleting(service)).get("x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_file", [True, False])
def test_a_write_whose_response_is_lost_is_known_as_ones_own(tmp_path: Path, as_file: bool) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    data = tmp_path / "file" if as_file else b"mine"
    assert BucketStore(Once(Service(), "lost")).put_if_absent("x", data)
    assert BucketStore(Once(Service(), "late")).put_if_absent("x", data)


@pytest.mark.parametrize("fault", ["lost", "late", "twice"])
def test_a_swap_whose_response_is_lost_is_known_as_ones_own(fault: str) -> None:
    service = Service()
    service.write("x", b"old", None)
    assert BucketStore(Once(service, fault)).compare_and_swap("x", b"new", "1")
    assert service.objects["x"] == (b"new", 2)


def test_a_conflict_after_an_error_is_still_a_conflict() -> None:
    service = Service()
    service.write("x", b"theirs", None)
    store = BucketStore(Once(service, "busy", "busy"))
    assert not store.put_if_absent("x", b"ours")
    assert not store.compare_and_swap("x", b"ours", None)
    assert service.objects["x"][0] == b"theirs"


def test_a_put_that_somebody_else_keeps_overwriting_is_temporary(tmp_path: Path) -> None:
    service, content = Service(), count()
    (tmp_path / "file").write_bytes(b"mine")

    class Contended(FaultyRequests):
        def head(self, name: str) -> Stat | None:
            found = super().head(name)
            service.write(name, b"%d" % next(content), found.version if found else None)
            return found

    with pytest.raises(errors.TryLater, match="keeps being written by somebody else"):
        BucketStore(Contended(service, 0)).put("x", tmp_path / "file")


@pytest.mark.fault("hostile files and names", "object names", "refused in one sentence")
@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", "./a", "a\nb", "a\x1b[2Jb", "a\0b"])
def test_an_object_with_a_hostile_name_is_refused_when_it_is_listed(name: str) -> None:
    service = Service()
    service.write(name, b"", None)
    store: Store = BucketStore(FaultyRequests(service, 0))
    with pytest.raises(errors.DataError, match=r"holds an object that cannot be used.*rename or delete it") as caught:
        list(store.list(""))
    assert str(caught.value).isprintable()


def test_the_stand_ins_for_folders_are_no_objects() -> None:
    service = Service()
    for name in ("folder/", "folder/x"):
        service.write(name, b"", None)
    assert list(BucketStore(FaultyRequests(service, 0)).list("")) == [("folder/x", 0)]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (301, errors.ConfigError),
        (400, errors.ConfigError),
        (401, errors.NotAllowed),
        (403, errors.NotAllowed),
        (404, errors.InputMissing),
        (408, errors.ServiceUnavailable),
        (409, errors.TryLater),
        (412, bucket.Overtaken),
        (429, errors.ServiceUnavailable),
        (500, errors.ServiceUnavailable),
        (503, errors.ServiceUnavailable),
    ],
)
def test_each_status_has_its_error(status: int, kind: type[errors.QuotesmithError]) -> None:
    found, cure = bucket.verdict(status)
    assert found is kind and cure
