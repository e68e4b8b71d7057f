import os
from types import SimpleNamespace

import pytest

from pipeline import work_cache
from pipeline.sealed import MARKER, seal
from pipeline.work_cache import make_room, others, place, touch

A, B, C, D = (letter * 16 for letter in "abcd")


def stage(work, name, age, size=100, finished=True):
    folder = work / name
    folder.mkdir(parents=True)
    (folder / "model").write_bytes(bytes(size))
    if finished:
        seal(folder, {})
    for path in (folder / MARKER if finished else folder, folder):
        os.utime(path, (1000 - age, 1000 - age))
    return folder


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A disk of 1000 bytes, of which the models take their part."""

    def usage(path):
        return SimpleNamespace(free=1000 - sum(model.stat().st_size for model in tmp_path.rglob("model")))

    monkeypatch.setattr(work_cache.shutil, "disk_usage", usage)
    return tmp_path


def left(work):
    return {place(path) for path in work.glob("*/*")}


def test_folders_go_from_the_one_used_longest_ago_until_there_is_room(disk):
    for number, name in enumerate((f"finetune/{A}", f"finetune/{B}", f"recover/{C}")):
        stage(disk, name, age=number)
    make_room(disk, 700, [])
    assert len(left(disk)) == 3
    make_room(disk, 750, [])
    assert left(disk) == {f"finetune/{A}", f"finetune/{B}"}
    make_room(disk, 900, [])
    assert left(disk) == {f"finetune/{A}"}


def test_what_this_job_uses_stays_even_when_there_is_no_room(disk):
    for name in (f"finetune/{A}", f"finetune/{A}.checkpoints", f"finetune/{B}", f"finetune/{B}.checkpoints"):
        stage(disk, name, age=1, finished="checkpoints" not in name)
    make_room(disk, 10_000, [f"finetune/{A}"])
    assert left(disk) == {f"finetune/{A}", f"finetune/{A}.checkpoints"}


def test_a_folder_that_was_used_is_young_again(disk):
    old = stage(disk, f"finetune/{A}", age=9)
    stage(disk, f"finetune/{B}", age=1)
    touch(old)
    make_room(disk, 900, [])
    assert left(disk) == {f"finetune/{A}"}


def test_what_is_not_of_this_program_is_never_removed(disk):
    mine = ["photos/summer", "release/0123", f"finetune/{A}x", "finetune/notes", f"{A}/deep"]
    for name in mine:
        stage(disk, name, age=9)
    (disk / "finetune" / B).write_text("a file")
    stage(disk, f"finetune/{D}", age=1)
    make_room(disk, 10_000, [])
    assert left(disk) == {*mine, f"finetune/{B}"}


def test_a_work_folder_that_is_not_there_has_nothing_to_remove(tmp_path):
    make_room(tmp_path / "absent", 10**18, [])
    assert others(tmp_path / "absent", []) == []
