"""The exit code is that of the work, whatever became of stdout and stderr: real pipes, closed, full and left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The command line with a job of one line in place of the real one, which takes a minute.
JOB = """
import os, sys, time, types, pipeline
pipeline.job = types.SimpleNamespace(run=lambda *_, **__: job())
pipeline.report = types.SimpleNamespace(of_run=lambda outcome: "published\\n" * 99999)
from pipeline.errors import DataError
def job():
    WORK
import entrypoint
sys.argv = ["quotesmith", "run"]
entrypoint.main()
"""
WORKS = {0: "pass", 65: "raise DataError('no text')", 70: "raise ZeroDivisionError", 71: "raise OSError(28, 'full')"}
WAITS = "os.write(1, b'ready\\n'); time.sleep(60)"


def script(work):
    return [sys.executable, "-c", JOB.replace("WORK", work)]


def ended(command, streams, **more):
    """The exit code with both streams as told: `left` is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY) if streams == "full" else None
    to = {"left": writer, "full": full, "closed": None}[streams]
    closes = (lambda: (os.close(1), os.close(2))) if streams == "closed" else None
    process = subprocess.Popen(command, cwd=ROOT, stdout=to, stderr=to, preexec_fn=closes, **more)
    for descriptor in (writer, full):
        if descriptor is not None:
            os.close(descriptor)
    return process.wait(60)


@pytest.mark.parametrize("streams", ["left", "full", "closed"])
@pytest.mark.parametrize("code", WORKS)
def test_the_code_of_a_job_is_that_of_its_work_whoever_listens(code, streams):
    assert ended(script(WORKS[code]), streams) == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_its_code_when_the_reader_got_it_too(number, code):
    process = subprocess.Popen(script(WAITS), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.send_signal(number)
    assert process.wait(30) == code


@pytest.mark.parametrize(("streams", "code"), [("left", 0), ("closed", 0), ("full", 71)])
def test_what_was_asked_for_may_be_left_unread_but_not_be_lost(streams, code):
    assert ended([sys.executable, ROOT / "entrypoint.py", "config"], streams) == code


def test_nothing_is_written_into_what_was_opened_in_place_of_a_closed_stream(tmp_path):
    opens = f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'noise'); os.write(2, b'noise')"
    assert ended(script(opens), "closed") == 0
    assert (tmp_path / "file").read_bytes() == b""
