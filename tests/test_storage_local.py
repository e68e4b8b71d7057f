from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.storage import local, open_store


@pytest.fixture
def locked_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder this process may not write to: root, who may write everywhere, becomes nobody meanwhile."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    if user == 0:
        os.seteuid(user)


def test_a_file_uri_is_a_folder(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/with%20space").put_if_absent("x", b"1")
    assert (tmp_path / "with space" / "x").read_bytes() == b"1"
    with pytest.raises(errors.ConfigError, match="file:///absolute/path"):
        open_store("file://host/path")


def test_an_unwritable_folder_is_not_allowed(locked_folder: Path) -> None:
    with pytest.raises(errors.NotAllowed, match="Permission denied"):
        open_store(str(locked_folder / "bucket")).probe()


def test_a_file_where_the_folder_should_be_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(errors.ConfigError, match="taken"):
        open_store(str(tmp_path / "taken")).probe()


def test_a_full_disk_is_the_machines_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    store = open_store(str(tmp_path))
    monkeypatch.setattr(local, "sync", full)
    with pytest.raises(errors.MachineError, match="No space left"):
        store.put_if_absent("x", b"data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "cure"), [(24, "ulimit -n"), (27, "ulimit -f"), (12, "memory")])
def test_what_a_limit_of_the_process_forbids_is_the_machines_error(
    number: int, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(local, "sync", refused)
    with pytest.raises(errors.MachineError, match=cure):
        open_store(str(tmp_path)).put_if_absent("x", b"data")


def test_a_drive_without_hard_links_writes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    store = open_store(str(tmp_path))
    assert store.put_if_absent("x", b"one") and not store.put_if_absent("x", b"two")
    assert store.read("x") == b"one" and len(list(tmp_path.iterdir())) == 1


def put_something_else(path: Path, kind: str) -> None:
    """Where an object should be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "dangling" else path.name)


@pytest.mark.parametrize("kind", ["folder", "dangling", "circle", "pipe"])
def test_what_is_no_file_is_a_wrong_setting_and_not_an_absent_object(tmp_path: Path, kind: str) -> None:
    put_something_else(tmp_path / "x", kind)
    store = open_store(str(tmp_path))
    for act in (
        lambda: store.stat("x"),
        lambda: store.put_if_absent("x", b"1"),
        lambda: store.compare_and_swap("x", b"1", None),
    ):
        with pytest.raises(errors.ConfigError, match=r"x is a folder, .* a file was needed there"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_link_to_a_file_is_one(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_if_absent("there", b"1")
    (tmp_path / "x").symlink_to("there")
    found = store.stat("x")
    assert found and found.size == 1 and not store.put_if_absent("x", b"2")


def test_a_file_that_is_removed_while_it_is_looked_at_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    for step in ("version_of", "crc32c_of", "refuse_other_than_file"):
        store.put_if_absent("x", b"1")
        act = getattr(local, step)
        with monkeypatch.context() as patch:
            patch.setattr(local, step, lambda path, act=act: (path.unlink(), act(path)))
            assert store.stat("x") is None


def test_what_is_written_is_synced_up_to_the_folder_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(local, "sync", synced.append)
    open_store(str(tmp_path / "bucket")).put_if_absent("runs/run1/MANIFEST.json", b"{}")
    folder = tmp_path / "bucket" / "runs" / "run1"
    assert synced[:3] == [folder.parent, folder.parent.parent, tmp_path] and synced[-1] == folder and len(synced) == 5
    synced.clear()
    open_store(str(tmp_path / "bucket")).put_if_absent("runs/run1/other", b"{}")
    assert len(synced) == 2 and synced[-1] == folder


def test_a_file_with_a_control_character_in_its_name_is_refused_when_it_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a\nb").write_text("x")
    with pytest.raises(errors.DataError, match="control character"):
        list(open_store(str(tmp_path)).list(""))


KILLED_WHILE_IT_WRITES = """
import os, signal, sys
from pathlib import Path
from pipeline.storage import local, open_store
local.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
open_store(sys.argv[1]).put_if_absent(sys.argv[2], b"data")
"""


@pytest.mark.skipif(not Path("/proc/self/ns").exists(), reason="the system has no /proc")
@pytest.mark.parametrize("name", ["x", "runs/a/x", "runs/b/x"])
def test_what_a_killed_writer_left_is_cleared_up_at_the_top_and_in_the_folder_that_is_named(
    tmp_path: Path, name: str
) -> None:
    subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_WRITES, tmp_path, name])
    (left,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left.name.startswith(local.TEMPORARY) and left.read_bytes() == b"data"
    store = open_store(str(tmp_path))
    assert list(store.list("")) == []
    store.clear_up("runs/a")
    assert left.exists() == (name == "runs/b/x")


def test_what_a_writer_elsewhere_left_is_cleared_up_when_it_has_long_stood_still(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with local.written(tmp_path / "mine") as mine:
        theirs = tmp_path / f"{local.TEMPORARY}_0123456789abcdef"
        for path in (mine, theirs):
            path.write_bytes(b"part")
        store.clear_up("runs/a")
        assert mine.exists() and theirs.exists()
        os.utime(theirs, (0, 0))
        store.clear_up("runs/a")
        assert mine.exists() and not theirs.exists()
