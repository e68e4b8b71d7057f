from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import publish as module
from pipeline.errors import ConfigError, DataError, InputMissing, TargetTaken, TransferError
from pipeline.publish import find_release, publish, read_metrics, refuse_foreign_files, verify
from pipeline.storage import Store, open_store

Files = dict[str, Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write(tmp_path / "made", b"weights", b'{"seconds": 1}')


def write(folder: Path, weights: bytes, metrics: bytes) -> Files:
    folder.mkdir(exist_ok=True)
    contents = {"voice-Q2_K.gguf": weights, "metrics.json": metrics, "README.md": b"# card"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


@pytest.fixture(params=["local", "gs", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    root = request.getfixturevalue({"gs": "gcs_bucket_uri", "s3": "s3_bucket_uri"}[request.param])
    return f"{root}/out"


def release(output: str, files: Files, run_id: str = "run1") -> None:
    publish(output, run_id=run_id, name="voice", files=files)


def listing(output: str) -> dict[str, bytes]:
    store = open_store(output)
    return {name: store.read(name) for name, _ in store.list("")}


def test_a_release_is_laid_out_as_promised(output: str, files: Files) -> None:
    release(output, files)
    there = listing(output)
    manifest = json.loads(there["runs/run1/MANIFEST.json"])
    latest = json.loads(there["latest.json"])
    assert latest["run_id"] == manifest["run_id"] == "run1"
    assert len(manifest["objects"]) == 3
    for entry in manifest["objects"]:
        stored = there[f"runs/run1/objects/sha256/{entry['sha256']}"]
        assert stored == there[entry["name"]] == files[entry["name"]].read_bytes()
        assert entry["size_bytes"] == len(stored) and entry["crc32c"]
    assert len(there) == 3 + 1 + 1 + 3
    assert len(verify(output)) == 6


def test_publishing_the_same_result_again_changes_nothing(output: str, files: Files, tmp_path: Path) -> None:
    release(output, files)
    before = listing(output)
    release(output, write(tmp_path / "again", b"weights", b'{"seconds": 2}'))
    assert listing(output) == before


def test_another_result_for_the_same_run_is_refused(output: str, files: Files, tmp_path: Path) -> None:
    release(output, files)
    before = listing(output)
    with pytest.raises(TargetTaken, match="different result"):
        release(output, write(tmp_path / "other", b"other weights", b"{}"))
    assert listing(output) == before


class Failing:
    """A store that breaks at its nth write, like a network that goes away."""

    def __init__(self, store: Store, writes: int) -> None:
        self.store, self.left = store, writes

    def __getattr__(self, name: str) -> object:
        act = getattr(self.store, name)
        return self.counted(act) if name in ("put", "put_if_absent", "compare_and_swap") else act

    def counted(self, act: Callable[..., object]) -> Callable[..., object]:
        def write(*args: object) -> object:
            self.left -= 1
            if self.left < 0:
                raise TransferError("the network is gone")
            return act(*args)

        return write


WRITES = 3 + 1 + 1 + 3  # objects, manifest, latest.json, plain copies


@pytest.mark.parametrize("writes", range(WRITES))
def test_a_crash_at_any_write_leaves_no_release_or_a_whole_one(
    tmp_path: Path, files: Files, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "out")
    store = Failing(open_store(output), writes)
    with monkeypatch.context() as patch, pytest.raises(TransferError):
        patch.setattr(module, "open_store", lambda uri: store)
        release(output, files)
    there = listing(output) if Path(output).exists() else {}
    assert ("runs/run1/MANIFEST.json" in there) == (writes > 3)
    assert ("latest.json" in there) == (writes > 4)
    assert sum(name in there for name in files) == max(0, writes - 5)
    assert (find_release(output, "run1") is None) == (writes <= 3)
    if writes > 3:
        verify(f"{output}/runs/run1")
    release(output, files)
    assert len(verify(output)) == 6


def test_the_writes_counted_above_are_all_there_are(
    tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Failing(open_store(str(tmp_path / "out")), WRITES)
    monkeypatch.setattr(module, "open_store", lambda uri: store)
    release(str(tmp_path / "out"), files)
    assert store.left == 0


def test_a_damaged_object_of_a_torn_run_is_replaced(output: str, files: Files) -> None:
    release(output, files)
    name = next(name for name in listing(output) if "/objects/" in name)
    damage(output, name)
    release(output, files)
    verify(output)


@pytest.mark.parametrize("victim", ["/objects/", "voice-Q2_K.gguf", "README.md"])
def test_verify_finds_a_flipped_byte_and_names_its_file(output: str, files: Files, victim: str) -> None:
    release(output, files)
    name = next(name for name in listing(output) if victim in name)
    damage(output, name)
    with pytest.raises(DataError, match=f"{name}.* does not match the manifest"):
        verify(output)


def damage(output: str, name: str) -> None:
    store = open_store(output)
    found = store.stat(name)
    content = bytearray(store.read(name))
    content[0] ^= 1
    assert found and store.compare_and_swap(name, bytes(content), found.version)


def test_verify_finds_a_missing_file(tmp_path: Path, files: Files) -> None:
    release(str(tmp_path / "out"), files)
    (tmp_path / "out" / "README.md").unlink()
    with pytest.raises(DataError, match=r"README\.md is gone"):
        verify(str(tmp_path / "out"))
    assert len(verify(str(tmp_path / "out/runs/run1"))) == 3


def test_verify_takes_the_output_the_run_or_the_manifest(output: str, files: Files) -> None:
    release(output, files)
    release(output, files, "run2")
    assert len(verify(f"{output}/")) == 6
    for run in ("run1", "run2"):
        assert len(verify(f"{output}/runs/{run}")) == 3
        assert len(verify(f"{output}/runs/{run}/MANIFEST.json")) == 3


@pytest.mark.parametrize("part", ["", "/runs/run9", "/runs/run9/MANIFEST.json"])
def test_verify_says_that_nothing_is_published(output: str, part: str) -> None:
    with pytest.raises(InputMissing, match="published"):
        verify(output + part)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"run_id": "run1"', '"run_id": "run2"', "copied from elsewhere"),
        ('"schema_version": 1', '"schema_version": 9', "schema version 9"),
        ('"objects": [', '"objects": 5, "x": [', "not a manifest"),
        ('"voice-Q2_K.gguf"', '"voice-Q4_K.gguf"', "result_digest"),
        ('"README.md"', '"../README.md"', "cannot be an object's name"),
        ('"README.md"', '"READYOU.md"', "another manifest"),
        ("{", "", "not a manifest"),
    ],
)
def test_an_altered_manifest_is_refused(tmp_path: Path, files: Files, old: str, new: str, why: str) -> None:
    release(str(tmp_path / "out"), files)
    path = tmp_path / "out/runs/run1/MANIFEST.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=why):
        verify(str(tmp_path / "out"))


@pytest.mark.fault("hostile files and names", "manifests that hold anything", "refused in one printable sentence")
@pytest.mark.parametrize(
    "change",
    [
        {"objects": [5]},
        {"objects": {"a": 1}},
        {"run_id": "\x1b[2J\n" * 100},
        {"created": "9" * 100_000},
        {"created": ["\x1b"]},
        {"schema_version": "\x1b[2J" * 100},
        {"result_digest": None},
    ],
)
def test_what_a_manifest_holds_cannot_break_a_message(change: dict[str, object], tmp_path: Path, files: Files) -> None:
    release(str(tmp_path / "out"), files)
    path = tmp_path / "out/runs/run1/MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError) as caught:
        verify(str(tmp_path / "out"))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_latest_moves_to_a_newer_release_but_never_back(
    output: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = write(tmp_path / "newer", b"new weights", b"{}")
    monkeypatch.setattr(module.time, "strftime", lambda *_: "2030-01-01T00:00:00Z")
    release(output, files, "old")
    monkeypatch.setattr(module.time, "strftime", lambda *_: "2031-01-01T00:00:00Z")
    release(output, newer, "new")
    assert listing(output)["voice-Q2_K.gguf"] == b"new weights"
    release(output, files, "old")
    assert json.loads(listing(output)["latest.json"])["run_id"] == "new"
    assert listing(output)["voice-Q2_K.gguf"] == b"new weights"


@pytest.mark.parametrize("name", ["latest.json", "voice-Q2_K.gguf", "runs/run1/MANIFEST.json"])
@pytest.mark.parametrize("published_before", [False, True])
def test_a_folder_where_a_file_belongs_is_found_before_the_work(
    tmp_path: Path, files: Files, name: str, published_before: bool
) -> None:
    output = tmp_path / "out"
    if published_before:
        release(str(output), files, "earlier")
        (output / name).unlink(missing_ok=True)
    (output / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"{name} is a folder, .* a file was needed there"):
        refuse_foreign_files(str(output), list(files))
        find_release(str(output), "run1")


def says_created(output: str, name: str, created: object) -> None:
    """As a publisher with a wrong clock, or somebody else, left it."""
    path = Path(output) / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "created": created}))


@pytest.mark.parametrize("created", ["2125-01-01T00:00:00Z", "9999", "", "9" * 10_000 + "\n"])
def test_a_publisher_with_a_wrong_clock_does_not_keep_latest_from_the_next(
    tmp_path: Path, files: Files, created: str, caplog: pytest.LogCaptureFixture
) -> None:
    output, newer = str(tmp_path / "out"), write(tmp_path / "newer", b"new weights", b"{}")
    release(output, files, "ahead")
    says_created(output, "latest.json", created)
    release(output, newer, "new")
    assert json.loads(listing(output)["latest.json"])["run_id"] == "new"
    assert listing(output)["voice-Q2_K.gguf"] == b"new weights" and len(verify(output)) == 6
    warning = next(record for record in caplog.records if "not taken for newer" in record.getMessage())
    assert warning.getMessage().isprintable() and len(warning.getMessage()) < 500


@pytest.mark.parametrize(("ahead_seconds", "stays"), [(40, True), (90, False)])
def test_a_minute_between_two_clocks_is_nothing_to_mistrust(
    tmp_path: Path, files: Files, ahead_seconds: float, stays: bool
) -> None:
    output, newer = str(tmp_path / "out"), write(tmp_path / "newer", b"new weights", b"{}")
    release(output, files, "ahead")
    says_created(output, "latest.json", module.manifest.created_at(time.time() + ahead_seconds))
    release(output, newer, "new")
    assert json.loads(listing(output)["latest.json"])["run_id"] == ("ahead" if stays else "new")


@pytest.mark.parametrize("created", [5, None, "9999", "2026-1-1T0:0:0Z", "٢٠٢٦-01-01T00:00:00Z", ["2026"]])
def test_a_manifest_of_no_time_is_bad_data_and_never_comes_into_latest(
    tmp_path: Path, files: Files, created: object
) -> None:
    output = str(tmp_path / "out")
    release(output, files)
    before = listing(output)["latest.json"]
    says_created(output, "runs/run1/MANIFEST.json", created)
    with pytest.raises(DataError, match="for when it was created, not a time like 1970-01-01T00:00:00Z"):
        release(output, files)
    assert listing(output)["latest.json"] == before


class Slow:
    """A store whose first plain copy takes so long that `meanwhile` happens."""

    def __init__(self, store: Store, meanwhile: Callable[[], object]) -> None:
        self.store, self.meanwhile = store, [meanwhile]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def put(self, name: str, path: Path) -> None:
        if self.meanwhile:
            self.meanwhile.pop()()
        self.store.put(name, path)


def test_of_two_that_copy_at_once_the_plain_files_are_the_newers(
    tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, newer = str(tmp_path / "out"), write(tmp_path / "newer", b"new weights", b"{}")
    store = open_store(output)

    def publish_newer() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, "open_store", open_store)
            patch.setattr(module.time, "strftime", lambda *_: "2031-01-01T00:00:00Z")
            release(output, newer, "new")

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_store", lambda uri: Slow(store, publish_newer))
        release(output, files, "old")
    assert json.loads(listing(output)["latest.json"])["run_id"] == "new"
    assert listing(output)["voice-Q2_K.gguf"] == b"new weights"
    assert len(verify(output)) == 6


def test_plain_copies_of_a_newer_release_are_completed_too(
    tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, newer = str(tmp_path / "out"), write(tmp_path / "newer", b"new weights", b"{}")
    release(output, files, "old")
    monkeypatch.setattr(module.time, "strftime", lambda *_: "2031-01-01T00:00:00Z")
    release(output, newer, "new")
    (tmp_path / "out" / "README.md").unlink()
    release(output, files, "old")
    assert len(verify(output)) == 6
    (tmp_path / "out/runs/new/MANIFEST.json").unlink()  # by hand: then there is nothing to complete
    release(output, files, "old")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"run_id": 5}',
        b'{"run_id": "../x", "created": "", "manifest_sha256": ""}',
        b'{"run_id": "x", "created": 5, "manifest_sha256": ""}',
    ],
)
def test_a_pointer_that_somebody_else_wrote_is_bad_data(tmp_path: Path, content: bytes) -> None:
    open_store(str(tmp_path)).put_if_absent("latest.json", content)
    with pytest.raises(DataError, match="latest"):
        verify(str(tmp_path))


def test_completing_a_release_needs_only_its_objects(tmp_path: Path, files: Files) -> None:
    output = str(tmp_path / "out")
    release(output, files)
    for name in ("latest.json", "README.md"):
        (tmp_path / "out" / name).unlink()
    found = find_release(output, "run1")
    assert found and read_metrics(found) == {"seconds": 1}
    module.complete(found)
    assert len(verify(output)) == 6
