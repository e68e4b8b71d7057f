import os
import subprocess
import sys

import pytest

from pipeline import process

needs_proc = pytest.mark.skipif(not process.BOOT_ID.exists(), reason="the system has no /proc")


@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as started:
        yield started
        started.kill()


@needs_proc
def test_a_process_that_lives_is_not_gone_and_one_that_was_killed_is(child):
    its = {**process.identity(), "pid": child.pid, "start": process.started(child.pid)}
    assert not process.is_gone(process.identity()) and not process.is_gone(its)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.is_gone(its)  # a zombie
    child.wait()
    assert process.is_gone(its)


@needs_proc
def test_a_number_that_another_process_has_now_does_not_keep_the_dead_alive():
    assert process.is_gone({**process.identity(), "start": process.started(os.getpid()) - 1})


@pytest.mark.parametrize(
    "changes",
    [{"boot": "another"}, {"namespace": "pid:[1]"}, {"pid": "1"}, {"start": None}, {"pid": None}],
)
def test_a_process_that_cannot_be_seen_from_here_is_not_called_gone(changes):
    assert not process.is_gone({**process.identity(), "pid": 2**22 + 1, "start": 1, **changes})
    assert not process.is_gone({"host": "x"}) and not process.is_gone({})


@needs_proc
def test_a_signature_in_a_files_name_tells_whether_its_process_is_gone(child):
    its = process.signature().split(".")
    its[2:] = str(child.pid), str(process.started(child.pid))
    assert not process.is_gone_signature(process.signature()) and not process.is_gone_signature(".".join(its))
    child.kill()
    child.wait()
    assert process.is_gone_signature(".".join(its))


@pytest.mark.parametrize("text", ["", "a.b.c.d", "1.2.3", "x.1.2.3.4", "boot.1.4194305.1"])
def test_what_is_no_signature_of_this_machine_is_not_called_gone(text):
    assert not process.is_gone_signature(text)
