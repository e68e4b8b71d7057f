import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import work_folder
from pipeline.errors import MachineError, TryLater
from pipeline.work_folder import LOCK, alone_in, check_work_dir

HOLDS = (
    "import sys, time, pathlib, fcntl, os\n"
    "file = open(sys.argv[1], 'w')\n"
    "fcntl.flock(file, fcntl.LOCK_EX)\n"
    "file.write('process 7 on here'); file.flush()\n"
    "print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / LOCK], stdout=subprocess.PIPE) as started:
        assert started.stdout.readline() == b"held\n"
        yield started
        started.kill()


def test_a_second_job_in_a_work_folder_is_told_who_is_there(holder, tmp_path):
    with pytest.raises(TryLater, match="in use by process 7 on here; wait"), alone_in(tmp_path, 0):
        pass


def test_a_killed_job_leaves_its_work_folder_free(holder, tmp_path):
    threading.Timer(0.3, holder.kill).start()
    with alone_in(tmp_path, 30):
        pass


def test_a_second_job_waits_for_the_first_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(work_folder, "POLL_SECONDS", 0.01)
    inside = []

    def job():
        with alone_in(tmp_path, 30):
            inside.append(True)
            assert len(inside) == 1
            time.sleep(0.02)
            inside.pop()

    jobs = [threading.Thread(target=job) for _ in range(6)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join(30)
    assert not inside and not list(tmp_path.iterdir())


def test_a_folder_is_made_and_given_back_on_errors_too(tmp_path):
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path / "new" / "work", 0):
        raise ZeroDivisionError
    assert not list((tmp_path / "new" / "work").iterdir())


def test_a_full_disk_does_not_leave_the_lock_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(work_folder.os, "write", full)
    with alone_in(tmp_path, 0):
        assert (tmp_path / LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_a_signal_while_the_lock_is_taken_does_not_leave_it_behind(tmp_path, monkeypatch):
    def stopped(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(work_folder, "sign", stopped)
    with pytest.raises(KeyboardInterrupt), alone_in(tmp_path, 0):
        pass
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_a_folder_is_no_lack_of_rights(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(MachineError, match="work"):
        check_work_dir(tmp_path / "work")
