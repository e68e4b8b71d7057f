import logging
import signal
import threading
from types import SimpleNamespace

import pytest

from pipeline import checkpoints as module
from pipeline import signals
from pipeline.checkpoints import Checkpoints, step_of
from pipeline.config import ResumeConfig
from pipeline.errors import ServiceUnavailable, TryLater
from pipeline.mirror import Mirror
from pipeline.sealed import MARKER, opened

torn = pytest.mark.fault(
    "leases, failures, checkpoints",
    "checkpoints and copies that are torn, altered or hold a pickle",
    "passed over for one that is whole",
)

ALWAYS = ResumeConfig(steps=1)


def at(folder, mirror=None, cfg=ALWAYS):
    return Checkpoints(folder, cfg, mirror, "finetune/abc/training")


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, lambda folder, step=step: (folder / "state.json").write_text(str(step)))
    if checkpoints.copying:
        checkpoints.copying.join()


@pytest.fixture
def mirror(tmp_path):
    return Mirror(str(tmp_path / "bucket"), "run")


def test_the_newest_two_are_kept_here_and_in_the_bucket(tmp_path, mirror):
    checkpoints = at(tmp_path / "disk", mirror)
    assert checkpoints.newest() is None
    save(checkpoints, 9, 10, 11)
    assert [path.name for path in sorted((tmp_path / "disk").iterdir())] == ["step-00000010", "step-00000011"]
    assert mirror.names("finetune/abc/training") == [
        "finetune/abc/training/step-00000010",
        "finetune/abc/training/step-00000011",
    ]
    newest = checkpoints.newest()
    assert step_of(newest) == 11 and (newest / "state.json").read_text() == "11"


@pytest.mark.parametrize("steps", [1, 3])
def test_one_is_due_every_so_many_steps(steps, tmp_path):
    checkpoints = at(tmp_path, cfg=ResumeConfig(steps=steps, minutes=0))
    assert [step for step in range(1, 7) if checkpoints.due(step)] == list(range(steps, 7, steps))


def test_one_is_due_after_so_many_minutes_since_the_last(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    checkpoints = at(tmp_path, cfg=ResumeConfig(minutes=2))
    never = at(tmp_path, cfg=ResumeConfig(minutes=0))

    def due_at(seconds):
        clock[0] = seconds
        return checkpoints.due(1)

    assert [due_at(seconds) for seconds in (60, 119, 120, 200)] == [False, False, True, True] and not never.due(1)
    save(checkpoints, 1)
    assert [due_at(seconds) for seconds in (300, 319, 320)] == [False, False, True]


def test_a_process_that_is_to_stop_saves_and_copies_once_more_and_then_stops(tmp_path, mirror, monkeypatch):
    seldom = ResumeConfig(minutes=5)
    checkpoints, never = at(tmp_path / "disk", mirror, seldom), at(tmp_path / "none", cfg=ResumeConfig(minutes=0))
    assert not checkpoints.due(1)
    monkeypatch.setattr(signals.state, "received", signal.SIGTERM)
    assert checkpoints.due(1) and not never.due(1)
    with pytest.raises(signals.Stopped):
        save(checkpoints, 1)
    assert step_of(at(tmp_path / "elsewhere", mirror, seldom).newest()) == 1


def test_work_behind_the_last_checkpoint_stops_as_soon_as_that_is_copied(tmp_path, mirror, monkeypatch):
    copy, slow = mirror.save, threading.Event()
    monkeypatch.setattr(mirror, "save", lambda *given: slow.wait(10) and copy(*given))
    checkpoints = at(tmp_path / "disk", mirror)
    checkpoints.save(1, lambda folder: (folder / "state.json").write_text("1"))
    checkpoints.stop_if_asked()
    monkeypatch.setattr(signals.state, "received", signal.SIGTERM)
    threading.Timer(0.2, slow.set).start()
    with pytest.raises(signals.Stopped):
        checkpoints.stop_if_asked()
    assert step_of(at(tmp_path / "elsewhere", mirror).newest()) == 1


def test_training_of_a_start_that_was_overtaken_ends_at_its_next_checkpoint(tmp_path):
    class Owner:
        def require_held(self):
            raise TryLater("it was taken over")

        require_not_overtaken = require_held

    checkpoints = at(tmp_path / "disk", Mirror(str(tmp_path / "bucket"), "run", Owner()))
    with pytest.raises(TryLater):
        save(checkpoints, 1)
    checkpoints.copying.join()
    assert checkpoints.at(1).exists() and not (tmp_path / "bucket").exists()


def test_a_process_that_is_to_stop_stops_also_where_there_is_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(signals.state, "received", signal.SIGINT)

    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt):
        at(tmp_path).save(1, full)


@torn
@pytest.mark.parametrize("damage", ["altered", "no marker", "torn marker", "gone", "other versions"])
def test_a_torn_one_is_passed_over_for_the_one_before(damage, tmp_path, caplog, monkeypatch):
    checkpoints = at(tmp_path)
    save(checkpoints, 1)
    if damage == "other versions":
        monkeypatch.setattr(module, "version", lambda name: "0")
    save(checkpoints, 2)
    monkeypatch.undo()
    newest = tmp_path / "step-00000002"
    if damage == "altered":
        (newest / "state.json").write_text("3")
    if damage == "no marker":
        (newest / MARKER).unlink()
    if damage == "torn marker":
        (newest / MARKER).write_text((newest / MARKER).read_text()[:-3])
    if damage == "gone":
        (newest / "state.json").unlink()
    caplog.set_level(logging.WARNING)
    assert step_of(at(tmp_path).newest()) == 1
    names = (module.__name__, opened.__module__)
    said = [record for record in caplog.records if record.name in names and record.levelno == logging.WARNING]
    assert len(said) == (damage != "no marker")
    save(checkpoints, 2)
    assert step_of(at(tmp_path).newest()) == 2


def test_checkpoints_that_were_passed_over_do_not_push_out_those_made_after(tmp_path, mirror, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "version", lambda name: "0")
        save(at(tmp_path / "disk", mirror), 90, 100)
    checkpoints = at(tmp_path / "disk", mirror)
    assert checkpoints.newest() is None
    save(checkpoints, 10)
    assert step_of(checkpoints.newest()) == 10
    save(checkpoints, 20, 30)
    names = ["step-00000020", "step-00000030"]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == names
    assert [name.rpartition("/")[2] for name in mirror.names("finetune/abc/training")] == names


def test_clearing_waits_for_the_copies_of_every_part(tmp_path, mirror, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    original = mirror.save

    def slow(*given):
        started.set()
        go_on.wait(10)
        original(*given)

    monkeypatch.setattr(mirror, "save", slow)
    checkpoints = at(tmp_path / "disk", mirror)
    checkpoints.part("one.gguf").save(1, lambda folder: (folder / "state.json").write_text("1"))
    assert started.wait(10)
    threading.Timer(0.2, go_on.set).start()
    checkpoints.clear()
    assert list(mirror.store.list("")) == []


@torn
def test_what_is_torn_here_or_not_here_comes_from_the_bucket(tmp_path, mirror):
    save(at(tmp_path / "a", mirror), 1, 2)
    (tmp_path / "a" / "step-00000002" / "state.json").write_text("torn")
    for folder in ("a", "b"):
        newest = at(tmp_path / folder, mirror).newest()
        assert newest == tmp_path / folder / "step-00000002" and (newest / "state.json").read_text() == "2"


def test_a_newer_one_here_wins_over_the_buckets_and_a_newer_one_there_over_this_disks(tmp_path, mirror):
    save(at(tmp_path / "a", mirror), 1, 2)
    save(at(tmp_path / "a"), 3)
    save(at(tmp_path / "b"), 1)
    assert [step_of(at(tmp_path / folder, mirror).newest()) for folder in "ab"] == [3, 2]


@torn
def test_a_copy_with_a_pickle_among_its_files_is_passed_over(tmp_path, mirror, caplog):
    checkpoints = at(tmp_path / "a", mirror)
    save(checkpoints, 1)
    checkpoints.save(2, lambda folder: (folder / "pytorch_model.bin").write_text("pickle"))
    checkpoints.copying.join()
    assert step_of(at(tmp_path / "b", mirror).newest()) == 1
    assert "pytorch_model.bin, which is no file that this job makes" in caplog.text


def test_names_that_are_no_steps_are_left_alone(tmp_path, mirror):
    save(at(tmp_path / "a", mirror), 1)
    mirror.save(tmp_path / "a" / "step-00000001", "finetune/abc/training/step-x")
    mirror.save(tmp_path / "a" / "step-00000001", "finetune/abc/training/voice.gguf/step-00000009")
    (tmp_path / "a" / "step-99").mkdir()
    assert step_of(at(tmp_path / "a", mirror).newest()) == 1


def test_parts_have_checkpoints_of_their_own(tmp_path, mirror):
    checkpoints = at(tmp_path / "disk", mirror)
    save(checkpoints.part("one.gguf"), 5)
    save(checkpoints.part("two.gguf"), 6)
    assert step_of(at(tmp_path / "other", mirror).part("one.gguf").newest()) == 5
    assert checkpoints.newest() is None
    checkpoints.clear()
    assert not (tmp_path / "disk").exists() and list(mirror.store.list("")) == []


def test_a_write_that_is_killed_leaves_the_one_before_and_the_next_start_clears_up(tmp_path):
    checkpoints = at(tmp_path)
    save(checkpoints, 1)

    def killed(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, killed)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    (tmp_path / ".writing-abc").mkdir()  # as SIGKILL leaves it
    (tmp_path / ".writing-abc" / "half").write_text("x")
    assert step_of(at(tmp_path).newest()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_training_goes_on_when_the_bucket_is_away(tmp_path, mirror, monkeypatch, caplog):
    def gone(*_):
        raise ServiceUnavailable("it does not answer")

    monkeypatch.setattr(mirror.store, "put", gone)
    monkeypatch.setattr(mirror.store, "put_if_absent", gone)
    checkpoints = at(tmp_path / "disk", mirror)
    save(checkpoints, 1)
    assert "step-00000001 is not copied to the output: it does not answer" in caplog.text
    assert step_of(checkpoints.newest()) == 1


@pytest.mark.parametrize("sign", ["errno", "free"])
def test_a_full_disk_costs_the_checkpoint_and_not_the_work(sign, tmp_path, caplog, monkeypatch):
    checkpoints = at(tmp_path)
    save(checkpoints, 1)

    def full(folder):
        (folder / "half").write_text("x")
        if sign == "errno":
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")  # torch's word for it

    checkpoints.save(2, full)
    assert "no room on the disk for a checkpoint at step 2" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    save(checkpoints, 3)
    assert step_of(checkpoints.newest()) == 3


def test_another_error_while_writing_is_not_taken_for_a_full_disk(tmp_path):
    def wrong(folder):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        at(tmp_path).save(1, wrong)
    assert list(tmp_path.iterdir()) == []
