"""Stopping a process, as docker stop, Kubernetes and Ctrl-C do: scripts that do one thing each, the command line at
many moments, then whole runs."""

import fcntl
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline import signals

ROOT = Path(__file__).resolve().parent.parent

FAULT = pytest.mark.fault(
    "processes and whole runs", "SIGTERM, SIGINT, SIGHUP, SIGKILL", "the promised exit code, nothing left running"
)
STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
HEAD = """
import hashlib, os, signal, subprocess, sys, threading, time
from pipeline import child, groups, signals
signals.handle()
signals.state.grace_seconds = 20
say = lambda text: print(text, flush=True)
"""


@pytest.fixture
def script():
    """Starts Python code after HEAD; what it leaves running is killed."""
    started = []

    def run(code, *before):
        command = [*before, sys.executable, "-c", HEAD + code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
        return started[-1]

    yield run
    for each in started:
        each.kill()
        each.communicate()


def stopped(process, *numbers, says="ready"):
    """(code, stdout, stderr, seconds) after it said it was ready and got the signals."""
    assert process.stdout.readline() == f"{says}\n", process.stderr.read()
    time.sleep(0.1)
    begun = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        while process.poll() is None and is_pending(process.pid, number):  # two of a kind that wait become one
            time.sleep(0.01)
        time.sleep(0.1)
    said = process.communicate(timeout=30)
    return process.returncode, *said, time.monotonic() - begun


def is_pending(pid, number):
    masks = re.findall(r"S(?:ig|hd)Pnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


SOON = 0.8  # seconds of grace for what does not end by itself
HASTY = f"signals.state.grace_seconds = {SOON}\n"

UNWINDS = """
def work():
    with signals.unwinding():
        try:
            say("ready"); time.sleep(60)
        finally:
            say("cleaned up")
import entrypoint
signals.leave(entrypoint.exit_code_of(work))
"""


@pytest.mark.parametrize(("number", "code"), STOPS)
@FAULT
def test_a_first_signal_unwinds_the_work_and_says_so_once(number, code, script):
    returned, out, err, _ = stopped(script(UNWINDS), number)
    assert (returned, out) == (code, "cleaned up\n")
    assert err.count("stopped by") == 1 and number.name in err


@FAULT
def test_under_nohup_a_lost_terminal_stops_neither_the_work_nor_its_programs(script):
    ignores = """
def work():
    with signals.unwinding():
        say("ready"); time.sleep(0.5)
        with child.started(["sh", "-c", "kill -HUP $$; echo alive"], stdout=subprocess.PIPE) as (process, _):
            say(process.stdout.read().decode().strip())
signals.leave(work() or 0)
"""
    returned, out, _, _ = stopped(script(ignores, "nohup"), signal.SIGHUP)
    assert (returned, out) == (0, "alive\n")


@FAULT
def test_work_saves_itself_when_its_terminal_is_gone_and_refuses_what_a_bar_writes(tmp_path):
    saves = SAVES["where it can"].replace("say('saved')", "sys.stderr.write('bar'); sys.stderr.flush(); save()")
    code = HEAD + f"save = lambda: open({str(tmp_path / 'saved')!r}, 'w').close()\n" + PATIENT.replace("WORK", saves)
    leader, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code.replace('say("cleaned up")', "pass")],
        **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY),
    )
    os.close(terminal)
    assert os.read(leader, 100).startswith(b"ready")
    os.close(leader)
    assert process.wait(30) == 143 and (tmp_path / "saved").exists()


@pytest.mark.parametrize(("number", "code"), STOPS)
@FAULT
def test_an_error_that_a_signal_became_on_its_way_is_still_the_signal(number, code, script):
    swallowed = UNWINDS.replace('say("cleaned up")', "raise RuntimeError('a library of C')")
    returned, _, err, _ = stopped(script(swallowed), number)
    assert returned == code and "Traceback" not in err and number.name in err


STARTS = """
def work():
    with signals.unwinding():
        end = time.monotonic() + 60
        say("ready")
        while time.monotonic() < end:
            with child.started(["sleep", "600"], stdout=subprocess.DEVNULL):
                pass
import entrypoint
code = entrypoint.exit_code_of(work)
children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "comm="], capture_output=True, text=True).stdout
say(children.split())
signals.leave(code)
"""


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
@FAULT
def test_a_signal_while_a_program_is_started_or_ended_leaves_none_behind(script):
    chance = random.Random(0)
    for number, code in STOPS * 4:
        process = script(STARTS)
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.05, 0.1))
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (code, "['ps']\n"), err


@FAULT
def test_what_must_not_be_torn_is_finished_first(script):
    whole = """
def work():
    with signals.unwinding():
        with signals.untorn():
            say("ready"); end = time.monotonic() + 2
            while time.monotonic() < end: pass
            say("whole")
        say("too far")
import entrypoint
signals.leave(entrypoint.exit_code_of(work))
"""
    returned, out, _, _ = stopped(script(whole), signal.SIGINT)
    assert (returned, out) == (130, "whole\n")


PATIENT = """
def work():
    with signals.unwinding():
        try:
            with signals.patient():
                say("ready")
                WORK
            say("too far")
        finally:
            say("cleaned up")
import entrypoint
signals.leave(entrypoint.exit_code_of(work))
"""
SAVES = {
    "where it can": "while not signals.is_stopping(): time.sleep(0.01)\n                say('saved'); signals.stop()",
    "by being done": "time.sleep(2); say('saved')",
}


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize(("number", "code"), STOPS)
@FAULT
def test_patient_work_saves_itself_before_a_first_signal_unwinds_it(number, code, how, script):
    returned, out, err, _ = stopped(script(PATIENT.replace("WORK", SAVES[how])), number)
    assert (returned, out) == (code, "saved\ncleaned up\n") and number.name in err


LONG = {
    "a step": "hashlib.pbkdf2_hmac('sha256', b'', b'', 100); time.sleep(60)",
    "a copy": "copy = threading.Thread(target=time.sleep, args=(60,), daemon=True); copy.start(); copy.join()",
}


@pytest.mark.parametrize("what", LONG)
@FAULT
def test_saving_that_takes_too_long_leaves_time_to_clean_up(what, script):
    long = "signals.state.grace_seconds = 4\n" + PATIENT.replace("WORK", LONG[what])
    returned, out, _, seconds = stopped(script(long), signal.SIGTERM)
    assert (returned, out) == (143, "cleaned up\n") and 2 < seconds < 4


DESTROYED = """
class Slow:
    def __del__(self):
        say("ready")
        while not signals.is_stopping(): time.sleep(0.01)
        time.sleep(60)
def destroy():
    slow = Slow()
    del slow
    time.sleep(60)
"""


@FAULT
def test_a_signal_whose_exception_is_lost_in_a_destructor_unwinds_the_work_all_the_same(script):
    code = UNWINDS.replace('say("ready")', "destroy()")
    returned, out, err, seconds = stopped(script(DESTROYED + code), signal.SIGTERM)
    assert (returned, out) == (143, "cleaned up\n") and "Exception ignored" not in err and seconds < 10


LEFT = """
def work():
    with signals.unwinding():
        process = subprocess.Popen(["sleep", "600"], process_group=0)
        groups.running.add(process.pid)  # and a signal comes before the block that would end it
        say("ready")
        time.sleep(60)
import entrypoint
code = entrypoint.exit_code_of(work)
say(subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "comm="], capture_output=True, text=True).stdout.split())
signals.leave(code)
"""


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
@FAULT
def test_a_program_that_a_signal_kept_from_being_ended_is_ended_at_last(script):
    returned, out, _, _ = stopped(script(LEFT), signal.SIGTERM)
    assert (returned, out) == (143, "['ps']\n")


@FAULT
def test_a_second_signal_ends_patient_work_at_once(script):
    slow = "signals.state.grace_seconds = 60\n" + PATIENT.replace("WORK", LONG["a step"])
    returned, out, _, seconds = stopped(script(slow), signal.SIGTERM, signal.SIGTERM)
    assert (returned, out) == (143, "") and seconds < 5


def test_other_signals_do_not_put_off_the_end():
    reader, writer = os.pipe()
    for after in (0.4, 0.8, 1.2):
        threading.Timer(after, os.write, (writer, bytes([signal.SIGALRM]))).start()
    begun = time.monotonic()
    assert signals.next_stop(reader, 1) is None
    assert time.monotonic() - begun < 1.7
    os.write(writer, bytes([signal.SIGALRM, signal.SIGTERM]))
    assert signals.next_stop(reader, 5) == signal.SIGTERM


HANGS = {
    "in Python": "while True:\n try: time.sleep(60)\n except BaseException: pass",
    "in one long call": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "in cleaning up": "try: time.sleep(60)\nfinally: threading.Event().wait()",
}


@pytest.mark.parametrize("where", HANGS)
@pytest.mark.parametrize(("number", "code"), STOPS)
@FAULT
def test_whatever_hangs_the_process_ends_within_its_grace_period(number, code, where, script):
    hangs = f"{HASTY}signals.state.unwinds = True\nsay('ready')\n{HANGS[where]}"
    returned, _, err, seconds = stopped(script(hangs), number)
    assert returned == code and number.name in err
    assert 0.6 < seconds < SOON + 3  # a busy machine


@FAULT
def test_a_second_signal_ends_it_at_once(script):
    slow = "signals.state.grace_seconds = 60\nsignals.state.unwinds = True\nsay('ready')\n" + HANGS["in cleaning up"]
    returned, _, _, seconds = stopped(script(slow), signal.SIGTERM, signal.SIGTERM)
    assert returned == 143 and seconds < 5


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]])
@FAULT
def test_an_end_without_unwinding_still_says_why_where_the_platform_looks(numbers, script, tmp_path):
    note = tmp_path / "termination-log"
    note.write_text("older and longer than the sentence that follows, " * 9)
    hangs = f"from pathlib import Path\nsignals.state.note = Path({str(note)!r})\n{HANGS['in one long call']}"
    returned, _, err, seconds = stopped(
        script(HASTY + "signals.state.unwinds = True\nsay('ready')\n" + hangs), *numbers
    )
    assert returned == 143 and seconds < SOON + 3
    assert note.read_text() == err == f"{signals.sentence(signal.SIGTERM)}\n"


@FAULT
def test_a_note_that_cannot_be_written_and_a_log_that_nobody_reads_do_not_hold_the_end_up(script, tmp_path):
    full = "import fcntl\nfcntl.fcntl(2, 1031, 4096)  # F_SETPIPE_SZ\nos.write(2, bytes(4096))\n"
    hangs = f"from pathlib import Path\nsignals.state.note = Path({str(tmp_path)!r})\n{HANGS['in cleaning up']}"
    process = script(HASTY + full + "signals.state.unwinds = True\nsay('ready')\n" + hangs)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert process.communicate()[1] == "\0" * 4096


@FAULT
def test_with_nothing_to_save_the_first_signal_ends_it_at_once(script):
    slow = "signals.state.grace_seconds = 60\nsay('ready')\n" + HANGS["in one long call"]
    returned, _, err, seconds = stopped(script(slow), signal.SIGTERM)
    assert returned == 143 and seconds < 5 and "SIGTERM" in err


@FAULT
def test_a_signal_after_the_end_does_not_change_the_code(script):
    late = "threading.Thread(target=time.sleep, args=(60,)).start()\nsay('ready')\nsignals.leave(3)"
    process = script(late)
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 3


@FAULT
def test_the_signals_of_a_forked_child_are_its_own(script):
    forks = """
signals.state.unwinds = True
pid = os.fork()
if not pid:
    time.sleep(60)
    os._exit(0)
os.kill(pid, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
time.sleep(1.2)
say("still there")
"""
    process = script(forks)
    assert process.communicate(timeout=30) == ("still there\n", "") and process.returncode == 0


FAMILY = """
def work():
    with signals.unwinding(), child.started(["sh", "-c", "sleep 600 & sleep 600"], stdout=subprocess.DEVNULL) as (p, _):
        while len(os.listdir(f"/proc/{p.pid}/task")) and subprocess.run(["pgrep", "-cg", str(p.pid)],
                capture_output=True).stdout.strip() != b"3":
            time.sleep(0.01)
        say(p.pid); say("ready"); HANG
import entrypoint
signals.leave(entrypoint.exit_code_of(work))
"""
needs_pgrep = pytest.mark.skipif(
    not (Path("/proc/self").exists() and shutil.which("pgrep")), reason="needs Linux with pgrep"
)


@needs_pgrep
@pytest.mark.parametrize("hang", ["p.wait()", HANGS["in one long call"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@FAULT
def test_children_and_what_they_started_die_with_the_process(number, hang, script):
    process = script(HASTY + FAMILY.replace("HANG", hang))
    group = int(process.stdout.readline())
    stopped(process, number)
    (left,) = [set(members(group))]
    if number == signal.SIGKILL:  # only the kernel is left to do it, and it knows the child alone
        assert group not in left
        os.killpg(group, signal.SIGKILL)
    else:
        assert not left


def members(group):
    """Of a process group, without those that are dead."""
    for _ in range(100):
        found = [each for each in psutil.process_iter(["status"]) if group_of(each.pid) == group]
        left = [each.pid for each in found if each.info["status"] != psutil.STATUS_ZOMBIE]
        if not left:
            return []
        time.sleep(0.01)
    return left


def group_of(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def alone():
    """What makes a command process 1 of a namespace of its own; None where that is not allowed."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    able = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if able else None


@pytest.mark.parametrize(("number", "code"), STOPS)
@FAULT
def test_as_process_1_it_obeys_signals_and_leaves_no_zombies(number, code, script):
    command = alone()
    if command is None:
        pytest.skip("this system allows no process namespaces")
    first = """
assert os.getpid() == 1
for _ in range(3):
    child.run(["sh", "-c", "sleep 600 & true"])
states = [open(f"/proc/{pid}/stat").read().split(")")[1].split()[0] for pid in os.listdir("/proc") if pid.isdigit()]
assert states == ["R"] or states == ["S"], states
"""
    process = script(first + UNWINDS, *command)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    os.kill(psutil.Process(process.pid).children()[0].pid, number)
    _, said = process.communicate(timeout=30)
    assert number.name in said
    assert process.returncode in (code, -number)  # unshare passes on the code


def handles(pid, number):
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def command_line(*arguments, after=0.0):
    """The command line, and a signal `after` seconds from when it handles signals; its end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, ROOT / "entrypoint.py", *arguments], text=True, **pipes)
    while not handles(process.pid, signal.SIGHUP):  # the last that it sets
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(after)
    return process


@pytest.mark.parametrize(("number", "code"), STOPS)
@FAULT
def test_at_any_moment_of_a_short_command_a_signal_ends_it_or_finds_it_done(number, code):
    chance = random.Random(code)
    for _ in range(12):
        process = command_line("config", after=chance.uniform(0, 0.3))
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode in (0, code) and "Traceback" not in said, said
        assert process.returncode == 0 or number.name in said


def test_signals_are_handled_before_the_imports_that_take_time():
    shares = []
    for _ in range(3):  # a stall of the machine is no import
        begun = time.monotonic()
        process = command_line("config")
        handled = time.monotonic() - begun
        process.communicate(timeout=30)
        shares.append(handled / (time.monotonic() - begun))
    assert min(shares) < 0.7


@pytest.mark.parametrize(("number", "after"), [(signal.SIGTERM, 0.6), (signal.SIGINT, 1.2), (signal.SIGTERM, 2.0)])
@FAULT
def test_a_signal_while_torch_is_imported_ends_it_at_once(number, after, tmp_path):
    process = command_line("run", "--output", tmp_path / "out", "--llama-cpp", "/nowhere", after=after)
    begun = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode in (128 + number, 78) and "Traceback" not in said, said
    assert time.monotonic() - begun < 25


def start(model, folder, *more):
    """A job on a model that is given by its settings."""
    command = [sys.executable, "entrypoint.py", "run", "--input", f"{folder}/bucket/in", "--log-format", "text"]
    command += ["--output", f"{folder}/bucket/out", "--work-dir", f"{folder}/work"]
    command += [text for name, value in model.items() for text in (f"--{name.replace('_', '-')}", value)]
    command += ["--evaluate.samples", "1", "--evaluate.max-new-tokens", "8"]
    command += ["--calibration.generated", "8", "--recover.steps", "1"]
    command += ["--adapt.steps", "1", "--finish.steps", "1", *more]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(job, line):
    seen = []
    for text in job.stderr:
        seen.append(text)
        if line in text:
            return
    raise AssertionError(f"the job ended without saying {line!r}:\n{''.join(seen)}")


def tools_of(job):
    """The tools that it runs, once it runs one."""
    while job.poll() is None:
        if found := psutil.Process(job.pid).children(recursive=True):
            return found
        time.sleep(0.01)
    raise AssertionError("the job ended without running a tool")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [("finetune", signal.SIGINT, 130), ("export", signal.SIGTERM, 143), ("evaluate", signal.SIGINT, 130)],
)
@FAULT
def test_a_stopped_run_says_so_leaves_nothing_behind_and_goes_on_later(stage, number, code, small_model, tmp_path):
    from tests.test_job import QUOTES, write_bucket

    write_bucket(f"{tmp_path}/bucket/in", QUOTES, tmp_path)
    steps = ["--train.max-steps", "100" if stage == "finetune" else "2"]  # some are left however late the signal is
    steps += ["--quantize.encoder", "llama.cpp", "--calibration.max-tokens", "2000", "--evaluate.max-quotes", "20"]
    job = start(small_model, tmp_path, *steps, "--grace-seconds", "100")  # a step can take long beside other tests
    wait_for(job, f"{stage}: started")
    children = tools_of(job) if stage != "finetune" else []
    os.kill(job.pid, number)
    _, said = job.communicate(timeout=600)
    assert job.returncode == code, said
    assert "the same command goes on" in said and "Traceback" not in said
    assert not [child for child in children if child.is_running()]
    assert not [path for path in (tmp_path / "bucket" / "out").rglob("*") if path.is_file()]

    again = start(small_model, tmp_path, *steps)
    _, said = again.communicate(timeout=1800)
    assert again.returncode == 0, said
    assert "tokenize: already done" in said
    assert ("finetune: goes on from its checkpoint at step" in said) == (stage == "finetune")
    assert (tmp_path / "bucket" / "out" / "gpt2-ye-trump-Q2_K.gguf").exists()
