from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import stage
from pipeline.artifacts import Checkpoint, sha256_of
from pipeline.config import SparsityConfig
from pipeline.stage import Stages

ran = []


def copy(checkpoint: Checkpoint, cfg: SparsityConfig, *, seed: int, out: Path) -> Checkpoint:
    ran.append(seed)
    (out / "model.bin").write_bytes(b"weights")
    return Checkpoint(out, sha256_of(out / "model.bin"), {"seed": seed})


@pytest.fixture
def given(tmp_path):
    ran.clear()
    return Checkpoint(tmp_path / "in", "abc"), SparsityConfig()


def test_a_finished_stage_is_skipped_and_gives_the_same_artifact(given, tmp_path):
    first = Stages(tmp_path / "work").run(copy, *given, seed=1)
    stages = Stages(tmp_path / "work")
    assert stages.run(copy, *given, seed=1) == first
    assert ran == [1] and [record.skipped for record in stages.records] == [True]


@pytest.mark.parametrize("change", ["setting", "input", "context", "code", "outside"])
def test_a_stage_runs_again_when_what_decides_it_changes(given, tmp_path, change, monkeypatch):
    checkpoint, cfg = given
    seed, outside = 1, ""
    Stages(tmp_path).run(copy, checkpoint, cfg, seed=seed)
    if change == "setting":
        cfg = SparsityConfig(ratio=0.4)
    if change == "input":
        checkpoint = Checkpoint(checkpoint.path, "def")
    if change == "context":
        seed = 2
    if change == "code":
        monkeypatch.setattr(stage, "code_digest", lambda: "other")
    if change == "outside":
        outside = "model@2"
    Stages(tmp_path).run(copy, checkpoint, cfg, seed=seed, outside=outside)
    assert len(ran) == 2


@pytest.mark.parametrize("damage", ["no marker", "torn marker", "changed file", "missing file"])
def test_a_torn_stage_is_never_trusted(given, tmp_path, damage):
    out = Stages(tmp_path).run(copy, *given, seed=1).path
    marker = out / stage.MARKER
    if damage == "no marker":
        marker.unlink()
    if damage == "torn marker":
        marker.write_text(marker.read_text()[:50])
    if damage == "changed file":
        (out / "model.bin").write_bytes(b"Weights")
    if damage == "missing file":
        (out / "model.bin").unlink()
    again = Stages(tmp_path).run(copy, *given, seed=1)
    assert ran == [1, 1] and (again.path / "model.bin").read_bytes() == b"weights"


def test_a_work_folder_can_be_moved(given, tmp_path):
    Stages(tmp_path / "a").run(copy, *given, seed=1)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = Stages(tmp_path / "b").run(copy, *given, seed=1)
    assert ran == [1] and moved.path.is_relative_to(tmp_path / "b")


def test_an_input_without_an_identity_is_a_bug_not_a_cache_hit(tmp_path):
    @dataclass
    class Opaque:
        path: Path

    with pytest.raises(TypeError, match="no identity"):
        Stages(tmp_path).run(copy, Opaque(tmp_path), SparsityConfig(), seed=1)


def test_a_stage_that_fails_leaves_no_marker(given, tmp_path):
    def breaks(checkpoint: Checkpoint, *, out: Path) -> Checkpoint:
        (out / "half").write_text("x")
        raise OSError("boom")

    with pytest.raises(OSError):
        Stages(tmp_path).run(breaks, given[0])
    assert not list(tmp_path.rglob(stage.MARKER))
