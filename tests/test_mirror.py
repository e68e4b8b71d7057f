import logging
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from pipeline import bucket, retrying, sealed
from pipeline import mirror as mirroring
from pipeline.bucket import BucketStore
from pipeline.errors import InputMissing, ServiceUnavailable, TryLater
from pipeline.mirror import Mirror, tolerated
from pipeline.sealed import MARKER, opened, seal
from pipeline.storage import local, open_store
from tests.faulty_requests import FaultyRequests, Killed, Service, simulate_time

torn = pytest.mark.fault(
    "leases, failures, checkpoints",
    "checkpoints and copies that are torn, altered or hold a pickle",
    "passed over for one that is whole",
)

ALL = ("*",)
WEIGHTS = save({"w": torch.ones(3)})
FAULTS = ("busy", "lost", "delay", "cut", "short", "flipped", "late", "conflict", "twice")


@pytest.fixture(params=["folder", "gs"])
def output(request, tmp_path):
    if request.param == "gs":
        return f"{request.getfixturevalue('gcs_bucket_uri')}/out"
    return str(tmp_path / "bucket")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "deep").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(WEIGHTS)
    (path / "deep" / "empty.json").write_bytes(b"")
    seal(path, {"step": 3})
    return path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(output):
    return [name for name, _ in open_store(output).list("")]


def test_a_folder_comes_back_from_the_output_as_it_was(output, folder, tmp_path):
    mirror = Mirror(output, "run")
    assert not mirror.holds("a/b") and not mirror.fetch("a/b", tmp_path / "new" / "place", ALL)
    mirror.save(folder, "a/b")
    mirror.save(folder, "a/b")
    assert mirror.holds("a/b") and mirror.fetch("a/b", tmp_path / "new" / "place", ALL)
    assert contents(tmp_path / "new" / "place") == contents(folder)
    assert opened(tmp_path / "new" / "place")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["place"]
    assert all(name.startswith("runs/run/checkpoints/a/b/") for name in names(output)) and len(names(output)) == 3


def test_the_marker_is_written_last_and_removed_first(folder, tmp_path, monkeypatch):
    mirror = Mirror(str(tmp_path / "bucket"), "run")
    done = []

    def watched(method, act):
        return lambda name, *rest: done.append((method, name)) or act(name, *rest)

    for method in ("put", "put_if_absent", "remove"):
        monkeypatch.setattr(mirror.store, method, watched(method, getattr(mirror.store, method)))
    mirror.save(folder, "a")
    mirror.remove("a")
    written = [method != "remove" for method, _ in done]
    assert written == [True] * 3 + [False] * 3
    assert [number for number, (_, name) in enumerate(done) if name.endswith(MARKER)] == [2, 3]


@torn
@pytest.mark.parametrize("damage", ["object gone", "object altered", "object longer", "marker torn", "marker escapes"])
def test_a_damaged_copy_is_passed_over_with_one_line(folder, tmp_path, damage, caplog):
    mirror = Mirror(str(tmp_path / "bucket"), "run")
    mirror.save(folder, "a")
    place = tmp_path / "bucket" / "runs" / "run" / "checkpoints" / "a"
    weights = next(path for path in (place / "sha256").iterdir() if path.read_bytes() == WEIGHTS)
    if damage == "object gone":
        weights.unlink()
    if damage == "object altered":
        weights.write_bytes(WEIGHTS.swapcase())
    if damage == "object longer":
        weights.write_bytes(WEIGHTS * 1000)
    if damage == "marker torn":
        (place / MARKER).write_bytes((place / MARKER).read_bytes()[:50])
    if damage == "marker escapes":
        (place / MARKER).write_text((place / MARKER).read_text().replace("model.safetensors", "../outside"))
    to = tmp_path / "there"
    to.mkdir()
    (to / "older").write_bytes(b"older")
    assert not mirror.fetch("a", to, ALL)
    assert contents(to) == {"older": b"older"} and not (tmp_path / "outside").exists()
    assert len([record for record in caplog.records if "passed over" in record.message]) == 1
    assert not list(tmp_path.glob(".writing-*"))


@torn
def test_a_copy_that_holds_what_the_job_never_makes_is_passed_over(folder, tmp_path, caplog):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    seal(folder, {})
    mirror = Mirror(str(tmp_path / "bucket"), "run")
    mirror.save(folder, "a")
    assert not mirror.fetch("a", tmp_path / "to", ("*.safetensors", "*.json"))
    assert "pytorch_model.bin" in caplog.text and not (tmp_path / "to").exists()
    assert mirror.fetch("a", tmp_path / "to", ("*.safetensors", "*.json", "*.bin"))


@torn
def test_a_copy_whose_hashes_are_right_but_not_its_header_is_passed_over(folder, tmp_path, caplog):
    (folder / "model.safetensors").write_bytes(WEIGHTS.replace(b"[3]", b"[9]"))
    seal(folder, {})
    mirror = Mirror(str(tmp_path / "bucket"), "run")
    mirror.save(folder, "a")
    assert not mirror.fetch("a", tmp_path / "to", ALL) and not (tmp_path / "to").exists()
    assert "passed over: model.safetensors is broken: its tensor w has 12 bytes, which" in caplog.text


def test_a_copy_for_which_the_disk_has_no_room_is_not_fetched(folder, tmp_path, caplog, monkeypatch):
    mirror = Mirror(str(tmp_path / "bucket"), "run")
    mirror.save(folder, "a")
    monkeypatch.setattr(mirroring.shutil, "disk_usage", lambda path: SimpleNamespace(free=7))
    monkeypatch.setattr(mirror.store, "get", None)
    assert not mirror.fetch("a", tmp_path / "to", ALL)
    assert f"it has {len(WEIGHTS)} bytes, but the disk has 7 left" in caplog.text


@pytest.mark.parametrize("damage", ["altered", "gone", "no marker", "torn marker"])
def test_a_folder_that_is_not_whole_is_not_copied(damage, folder, tmp_path):
    file = folder / (MARKER if "marker" in damage else "model.safetensors")
    if damage in ("gone", "no marker"):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputMissing, match="not whole"):
        Mirror(str(tmp_path / "bucket"), "run").save(folder, "a")
    assert not (tmp_path / "bucket").exists()


def test_whole_folders_are_listed_and_removed_by_their_prefix(output, folder):
    mirror, other = Mirror(output, "run"), Mirror(output, "other")
    for name in ("x/step-1", "x/step-2", "xy/step-1"):
        mirror.save(folder, name)
    other.save(folder, "x/step-1")
    mirror.store.remove(f"runs/run/checkpoints/x/step-2/{MARKER}")
    assert mirror.names("x") == ["x/step-1"]
    mirror.remove("x")
    assert mirror.names("x") == [] and mirror.names("xy") == ["xy/step-1"]
    mirror.remove()
    assert names(output) and all(name.startswith("runs/other/") for name in names(output))


class Owned:
    """A run that is somebody else's once it was looked at so many times."""

    def __init__(self, times):
        self.times = times

    def require_held(self):
        self.times -= 1
        if self.times < 0:
            raise TryLater("it was taken over")

    require_not_overtaken = require_held


@pytest.mark.parametrize("times", [0, 1, 2])
def test_who_loses_the_run_writes_nothing_more_of_a_copy_and_removes_none(times, folder, tmp_path):
    output = str(tmp_path / "bucket")
    with pytest.raises(TryLater):
        Mirror(output, "run", Owned(times)).save(folder, "a")
    assert len(names(output)) == times and not Mirror(output, "run").holds("a")
    Mirror(output, "run", Owned(3)).save(folder, "a")
    with pytest.raises(TryLater):
        Mirror(output, "run", Owned(0)).remove("a")
    assert Mirror(output, "run").fetch("a", tmp_path / "to", ALL)


def test_what_a_job_can_do_without_is_said_and_no_more(caplog):
    caplog.set_level(logging.WARNING)
    with tolerated("not copied"):
        raise ServiceUnavailable("gs://x does not answer")
    assert "not copied: gs://x does not answer" in caplog.text
    with pytest.raises(KeyError), tolerated("not copied"):
        raise KeyError


def test_a_copy_is_whole_or_absent_whatever_the_network_does(folder, tmp_path, monkeypatch):
    simulate_time(monkeypatch)
    for module in (sealed, local, bucket, mirroring):
        monkeypatch.setattr(module, "sync", lambda path: None)  # no power fails here
    given = contents(folder)

    def mirror_over(service, seed, **network):
        store = BucketStore(FaultyRequests(service, seed, rate=0.3, faults=FAULTS, **network))
        monkeypatch.setattr(mirroring, "open_store", lambda uri: store)
        return Mirror("mem://bucket", "run")

    found = []
    for seed in range(300):
        service, to = Service(), tmp_path / str(seed)
        end = Killed if seed % 2 else ServiceUnavailable
        with suppress(Killed, *retrying.PASSING):
            mirror_over(service, seed, ends_after=seed % 23, end=end).save(folder, "a")
        found.append(mirror_over(service, seed + 1).fetch("a", to, ALL))
        assert found[-1] == to.exists()
        assert not found[-1] or contents(to) == given, f"seed {seed}"
        mirror_over(service, seed + 2).save(folder, "a")
        assert mirror_over(service, seed + 3).fetch("a", to, ALL), f"seed {seed}"
        with suppress(Killed):
            mirror_over(service, seed, ends_after=seed % 11, end=Killed).remove("a")
        stands = mirror_over(service, seed).names("") == ["a"]
        assert mirror_over(service, seed).fetch("a", tmp_path / "again", ALL) == stands
    assert 20 < sum(found) < 280
