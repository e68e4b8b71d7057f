import shutil
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pipeline import process, signals, stage
from pipeline.artifacts import Checkpoint, sha256_of
from pipeline.checkpoints import Checkpoints, step_of
from pipeline.claim import Claim
from pipeline.config import ResumeConfig, SparsityConfig
from pipeline.errors import CheckFailed, MachineError, ServiceUnavailable, TryLater
from pipeline.lease import Lease
from pipeline.sealed import MARKER
from pipeline.settings import resolve
from pipeline.stage import Stages
from pipeline.storage import open_store

ran = []
WEIGHTS = save({"w": torch.ones(3)})


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
    marker = out / MARKER
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
    assert not list(tmp_path.rglob(MARKER))


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no such file"), CheckFailed("a tool failed")])
def test_a_work_folder_that_is_deleted_meanwhile_is_the_machines_error(error, given, tmp_path):
    def breaks(checkpoint: Checkpoint, *, out: Path) -> Checkpoint:
        shutil.rmtree(tmp_path / "work")
        out.mkdir(parents=True)  # as libraries do that write
        raise error

    stages = Stages(tmp_path / "work")
    stages.run(copy, *given, seed=1)
    with pytest.raises(MachineError, match=r"work/copy/\w+ was removed while the job needed it; run again"):
        stages.run(breaks, given[0])


@pytest.mark.parametrize("what", ["file", "link", "dead link"])
def test_what_is_no_folder_makes_way_for_a_stages(what, given, tmp_path):
    out = Stages(tmp_path / "work").run(copy, *given, seed=1).path
    shutil.rmtree(out)
    if what == "file":
        out.write_text("x")
    else:
        out.symlink_to(tmp_path / "elsewhere")
    if what == "link":
        (tmp_path / "elsewhere").mkdir()
    Stages(tmp_path / "work").run(copy, *given, seed=1)
    assert ran == [1, 1] and (out / "model.bin").exists() and not out.is_symlink()


def test_a_gpu_that_fails_within_a_stage_is_worth_a_retry(given, tmp_path):
    def breaks(checkpoint: Checkpoint, *, out: Path) -> Checkpoint:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(TryLater, match="breaks: the GPU failed"):
        Stages(tmp_path).run(breaks, given[0])


@pytest.fixture
def bucket(tmp_path):
    return str(tmp_path / "bucket")


def finetune(checkpoint: Checkpoint, cfg: SparsityConfig, *, seed: int, out: Path) -> Checkpoint:
    """A stage that is worth a copy."""
    ran.append(seed)
    (out / "model").mkdir()
    (out / "model" / "model.safetensors").write_bytes(WEIGHTS)
    return Checkpoint(out / "model", sha256_of(out / "model" / "model.safetensors"), {"seed": seed})


def on_a_machine(work, bucket, stage=finetune, run_id="run", **resume):
    stages = Stages(work, ResumeConfig(**{"upload": "always", **resume}))
    stages.belong_to(bucket, run_id)
    return stages, lambda *given: stages.run(stage, *given, seed=1)


def test_a_start_on_an_empty_disk_takes_a_finished_stage_from_the_output(given, tmp_path, bucket):
    _, run = on_a_machine(tmp_path / "a", bucket)
    first = run(*given)
    stages, run = on_a_machine(tmp_path / "b", bucket)
    taken = run(*given)
    assert ran == [1] and stages.records[0].skipped and taken.sha256 == first.sha256 and taken.facts == first.facts
    assert taken.path.is_relative_to(tmp_path / "b") and (taken.path / "model.safetensors").read_bytes() == WEIGHTS
    stages, run = on_a_machine(tmp_path / "b", str(tmp_path / "empty"))
    assert run(*given) == taken and ran == [1]


@pytest.mark.parametrize("damage", ["altered", "no marker", "path outside", "another make"])
def test_a_copy_that_is_not_whole_is_done_again(given, tmp_path, bucket, damage):
    _, run = on_a_machine(tmp_path / "a", bucket)
    run(*given)
    (marker,) = (tmp_path / "bucket").rglob(MARKER)
    if damage == "altered":
        (object_,) = (tmp_path / "bucket").rglob("sha256/*")
        object_.write_bytes(b"Weights")
    if damage == "no marker":
        marker.unlink()
    if damage == "path outside":
        marker.write_text(marker.read_text().replace('"path":"model"', '"path":"/etc"'))
    if damage == "another make":
        marker.write_text(marker.read_text().replace('"seconds"', '"minutes"'))
    _, run = on_a_machine(tmp_path / "b", bucket)
    assert run(*given).path.is_relative_to(tmp_path / "b") and ran == [1, 1]


def test_what_is_done_but_has_no_copy_is_copied_by_the_next_start(given, tmp_path, bucket):
    Stages(tmp_path / "a").run(finetune, *given, seed=1)
    _, run = on_a_machine(tmp_path / "a", bucket)
    run(*given)
    assert ran == [1] and list((tmp_path / "bucket").rglob(MARKER))


def test_an_output_that_fails_after_the_work_does_not_undo_it(given, tmp_path, bucket, caplog, monkeypatch):
    def gone(*_):
        raise ServiceUnavailable("it does not answer")

    stages, run = on_a_machine(tmp_path / "a", bucket)
    monkeypatch.setattr(stages.mirror, "save", gone)
    assert run(*given).facts == {"seed": 1}
    assert "will do it again: it does not answer" in caplog.text


def test_a_stage_that_is_quickly_done_again_is_not_copied(given, tmp_path, bucket):
    _, run = on_a_machine(tmp_path / "a", bucket, stage=copy)
    run(*given)
    assert not (tmp_path / "bucket").exists()


@pytest.mark.parametrize(
    ("output", "upload", "copied"),
    [
        ("folder", "auto", False),
        ("file:///folder", "auto", False),
        ("gs://bucket/x", "auto", True),
        ("gs://bucket/x", "never", False),
        ("folder", "always", True),
    ],
)
def test_copies_are_made_where_the_output_is_a_bucket_or_when_asked_for(output, upload, copied, tmp_path):
    stages = Stages(tmp_path, ResumeConfig(upload=upload))
    stages.belong_to(output, "run")
    assert (stages.mirror is not None) == copied


@pytest.mark.parametrize(
    ("uri", "upload", "copied"),
    [("gs://bucket/x", "auto", True), ("folder", "auto", False), ("folder", "always", True)],
)
def test_copies_go_where_resume_uri_says(uri, upload, copied, tmp_path):
    stages = Stages(tmp_path, ResumeConfig(upload=upload, uri=uri))
    stages.belong_to("gs://another/y" if uri == "folder" else "folder", "run")
    assert (stages.mirror.store.uri if stages.mirror else None) == (uri if copied else None)


@pytest.mark.parametrize("keep", [False, True])
def test_the_copies_go_when_the_run_is_released_unless_they_are_to_stay(given, tmp_path, bucket, keep):
    stages, run = on_a_machine(tmp_path / "a", bucket, keep=keep)
    run(*given)
    stages.forget()
    assert bool([path for path in (tmp_path / "bucket").rglob("*") if path.is_file()]) == keep


def recover(checkpoint: Checkpoint, *, checkpoints: Checkpoints, out: Path) -> Checkpoint:
    """A stage that is killed at its second step when it starts from nothing."""
    found = checkpoints.newest()
    for step in range(step_of(found) + 1 if found else 1, 4):
        ran.append(step)
        checkpoints.save(step, lambda folder: (folder / "state.json").write_text("{}"))
        if step == 2 and not found:
            raise KeyboardInterrupt
    (out / "model.safetensors").write_bytes(WEIGHTS)
    return Checkpoint(out, "abc")


@pytest.mark.parametrize("same_disk", [True, False])
def test_a_stage_that_was_killed_goes_on_from_its_checkpoint_and_leaves_none(given, tmp_path, bucket, same_disk):
    def start(work):
        stages = Stages(tmp_path / work, ResumeConfig(upload="always", steps=1))
        stages.belong_to(bucket, "run")
        stages.run(recover, given[0])

    with pytest.raises(KeyboardInterrupt):
        start("a")
    for thread in threading.enumerate():
        if "_copy" in thread.name:
            thread.join()
    last = "a" if same_disk else "b"
    start(last)
    assert ran == [1, 2, 3]
    assert [path.name for path in (tmp_path / last / "recover").iterdir()] == [
        path.parent.parent.name for path in (tmp_path / "bucket").rglob(MARKER)
    ]
    assert [path.parent.name for path in (tmp_path / "bucket").rglob(MARKER)] == ["result"]


def test_a_start_that_was_overtaken_begins_no_more_work_and_copies_nothing(given, tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(process, "identity", lambda: {"host": "another machine", "pid": 7})
    monkeypatch.setattr(Lease, "_keep", lambda lease: None)  # as if it hung
    first = Claim(resolve({"output": bucket, "lease.seconds": "2"}, {}).config)
    first.run("run", "version")
    stages = Stages(tmp_path / "work", ResumeConfig(upload="always"))
    stages.belong_to(bucket, "run", first)
    stages.run(finetune, *given, seed=1)
    copies = set((tmp_path / "bucket").rglob("sha256/*"))
    second = Lease(open_store(bucket), "run", 2)
    second.acquire(60)
    stages.run(finetune, *given, seed=2)  # not told yet: it works, but its copy is refused
    with pytest.raises(TryLater, match="taken over by"):
        stages.run(finetune, *given, seed=3)
    assert ran == [1, 2] and set((tmp_path / "bucket").rglob("sha256/*")) == copies
    second.release()


@pytest.mark.parametrize(("minutes", "done"), [(5, True), (0, False)])
def test_a_stage_that_a_signal_finds_nearly_done_is_finished_before_the_end(
    minutes, done, given, tmp_path, monkeypatch
):
    monkeypatch.setattr(signals.state, "unwinds", True)
    monkeypatch.setattr(signals.state, "received", None)
    monkeypatch.setattr(signals.state, "owed", False)
    monkeypatch.setattr(signals.state, "grace_seconds", 3600.0)  # the alarm would kill this process, which handles none

    def quick(checkpoint: Checkpoint, *, checkpoints: Checkpoints, out: Path) -> Checkpoint:
        ran.append(1)
        if len(ran) == 1:
            signals.on_signal(signal.SIGTERM, None)
        (out / "model.safetensors").write_bytes(WEIGHTS)
        return Checkpoint(out, "abc")

    stages = Stages(tmp_path, ResumeConfig(minutes=minutes))
    with pytest.raises(signals.Stopped):
        stages.run(quick, given[0])
    monkeypatch.setattr(signals.state, "received", None)
    stages.run(quick, given[0])
    assert len(ran) == (1 if done else 2)


def test_older_folders_make_room_for_a_stage_that_needs_it_but_not_those_of_this_job(given, tmp_path):
    for seed in (1, 2):
        Stages(tmp_path).run(copy, given[0], given[1], seed=seed)
    stages = Stages(tmp_path)
    stages.needs = {"copy": 10**18}
    stages.run(copy, *given, seed=2)
    assert len(list((tmp_path / "copy").iterdir())) == 2  # it was done: nothing was needed
    stages.run(copy, *given, seed=3)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        record.fingerprint[:16] for record in stages.records
    }
