import json
import logging

import pytest

from pipeline import sealed
from pipeline.sealed import MARKER, opened, parsed, seal


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "deep").mkdir(parents=True)
    (path / "a.bin").write_bytes(b"abc")
    (path / "deep" / "b.bin").write_bytes(b"")
    return path


def test_a_sealed_folder_opens_with_what_was_said_of_it(folder):
    assert opened(folder) is None
    made = seal(folder, {"step": 3})
    assert opened(folder) == made and made.content == {"step": 3}
    assert {name: file.size for name, file in made.files.items()} == {"a.bin": 3, "deep/b.bin": 0}
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "a.bin", "deep"]


@pytest.mark.parametrize("damage", ["changed", "longer", "gone", "torn marker", "no marker"])
def test_a_folder_that_is_not_as_it_was_does_not_open(folder, damage, caplog):
    seal(folder, {})
    if damage == "changed":
        (folder / "a.bin").write_bytes(b"abd")
    if damage == "longer":
        (folder / "deep" / "b.bin").write_bytes(b"b")
    if damage == "gone":
        (folder / "deep" / "b.bin").unlink()
    if damage == "torn marker":
        (folder / MARKER).write_bytes((folder / MARKER).read_bytes()[:40])
    if damage == "no marker":
        (folder / MARKER).unlink()
    assert opened(folder) is None
    said = [r for r in caplog.records if r.name == opened.__module__ and r.levelno == logging.WARNING]
    assert len(said) == (damage != "no marker")


def test_every_file_and_folder_is_synced_before_the_marker_and_its_folder_after(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(sealed, "sync", lambda path: synced.append((path.name, (folder / MARKER).exists())))
    seal(folder, {})
    marker = [name for name, _ in synced].index(next(name for name, _ in synced if name.startswith(".writing-")))
    assert {("a.bin", False), ("deep", False), ("b.bin", False)} == set(synced[:marker])
    assert synced[-1] == (folder.parent.name, True)


def test_a_write_that_fails_leaves_no_marker_and_no_temporary_file(folder, monkeypatch):
    def full(path):
        if path.name.startswith(".writing-"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealed, "sync", full)
    with pytest.raises(OSError):
        seal(folder, {})
    assert sorted(path.name for path in folder.iterdir()) == ["a.bin", "deep"]


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "a\nb", "", MARKER])
def test_a_marker_that_lists_what_cannot_be_in_its_folder_is_none(name):
    file = {"sha256": "0" * 64, "size": 1}
    with pytest.raises(ValueError):
        parsed(json.dumps({"files": {name: file}, "content": {}}).encode())


@pytest.mark.parametrize("file", [{"sha256": "0" * 63, "size": 1}, {"sha256": "0" * 64, "size": -1}, {}, 3])
def test_a_marker_without_hash_or_size_is_none(file):
    with pytest.raises(ValueError):
        parsed(json.dumps({"files": {"a": file}, "content": {}}).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_bytes_that_are_no_marker_are_none(data):
    with pytest.raises(ValueError):
        parsed(data)
