import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipeline import child
from pipeline.errors import CheckFailed, MachineError, TryLater


def python(code):
    return [sys.executable, "-c", code]


def test_output_comes_back_even_if_it_is_not_utf8():
    finished = child.run(python("import sys; sys.stdout.buffer.write(b'a\\xff'); print('b', file=sys.stderr)"))
    assert (finished.stdout, finished.stderr) == ("a\ufffd", "b\n")


def test_a_failing_program_is_told_by_its_last_line():
    with pytest.raises(CheckFailed, match=r"exit code 3; its last line: the reason$"):
        child.run(python("import sys; print('noise\\nthe reason\\n\\n', file=sys.stderr); sys.exit(3)"))


def test_a_full_disk_is_the_machines_fault(tmp_path):
    with pytest.raises(MachineError, match="is full"):
        child.run(python("raise OSError(28, 'No space left on device')"), writes_in=tmp_path)


@pytest.mark.parametrize(
    "said", ["[Errno 5] Input/output error: 'x'", "failed to quantize: basic_ios::clear: iostream error"]
)
def test_a_failing_disk_is_the_machines_fault(said):
    with pytest.raises(MachineError, match="a disk did"):
        child.run(python(f"raise SystemExit({said!r})"))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise MemoryError", "memory"),
        ("import os; print('  what():  std::bad_alloc', file=sys.stderr, flush=True); os.abort()", "memory"),
        ("raise OSError(12, 'Cannot allocate memory')", "memory"),
        ("raise OSError(30, 'Read-only file system')", "read-only"),
        ("raise OSError(24, 'Too many open files')", "open"),
        ('raise RuntimeError("can\'t start new thread")', "no thread"),
        ("import os; os.kill(os.getpid(), 7)", "SIGBUS"),
    ],
)
def test_a_fault_that_passes_is_the_machines_and_no_failed_check(code, why):
    with pytest.raises(MachineError, match=why):
        child.run(python(f"import sys; {code}"))


def test_what_a_killed_program_was_still_to_read_hides_no_error():
    with (
        pytest.raises(ZeroDivisionError),
        child.started(python("import time; time.sleep(600)"), stdin=subprocess.PIPE, stdout=-1) as (process, _),
    ):
        process.stdin.write(b"x")  # kept in its buffer: written as the pipe is closed
        raise ZeroDivisionError


def test_a_killed_program_is_the_machines_fault():
    with pytest.raises(MachineError, match="memory"):
        child.run(python("import os; os.kill(os.getpid(), 9)"))


@pytest.fixture
def interruptible():
    """A shell's & has SIGINT ignored, in children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_program_that_somebody_stopped_can_be_run_again(number, interruptible):
    with pytest.raises(TryLater, match=f"stopped by {number.name}"):
        child.run(python(f"import os; os.kill(os.getpid(), {number:d})"))


def is_dead(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_a_program_started_and_left_ends_with_it():
    left = int(child.run(["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"]).stdout)
    for _ in range(1000):
        if is_dead(left):
            return
        time.sleep(0.01)
    raise AssertionError("it is still there")


def test_no_child_outlives_an_interrupted_block():
    with pytest.raises(KeyboardInterrupt), child.started(python("import time; time.sleep(600)"), stdout=-1) as (p, _):
        raise KeyboardInterrupt
    assert p.returncode == -9


def test_the_childs_peak_memory_is_its_own_not_this_process():
    ballast = bytearray(400 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])  # resident, not only promised
    peak = child.run(python("import time; x = b'x' * (50 << 20); time.sleep(2)")).peak_bytes
    assert 50 << 20 < peak < 200 << 20


def test_options_in_the_environment_do_not_reach_the_tools(monkeypatch):
    monkeypatch.setenv("LLAMA_ARG_TEMP", "2")
    assert child.run(python("import os; print(os.environ.get('LLAMA_ARG_TEMP'))")).stdout == "None\n"
