"""Stopping a real run, as docker stop, Kubernetes and Ctrl-C do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.test_job import QUOTES, write_bucket

ROOT = Path(__file__).resolve().parent.parent


def start(toy_gpt2, folder):
    command = [sys.executable, "entrypoint.py", "run", "--input", f"{folder}/bucket/in", "--log-format", "text"]
    command += ["--output", f"{folder}/bucket/out", "--work-dir", f"{folder}/work", "--model.base", str(toy_gpt2)]
    command += ["--train.max-steps", "2", "--evaluate.samples", "1", "--evaluate.max-new-tokens", "8"]
    command += ["--calibration.generated", "8", "--recover.steps", "1", "--finish.steps", "1"]
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
def test_a_stopped_run_says_so_leaves_nothing_behind_and_goes_on_later(
    stage, number, code, toy_gpt2, llama_cpp, tmp_path
):
    write_bucket(f"{tmp_path}/bucket/in", QUOTES, tmp_path)
    job = start(toy_gpt2, tmp_path)
    wait_for(job, f"{stage}: started")
    children = tools_of(job) if stage != "finetune" else []
    os.kill(job.pid, number)
    _, said = job.communicate(timeout=60)
    assert job.returncode == code, said
    assert "the same command goes on" in said and "Traceback" not in said
    assert not [child for child in children if child.is_running()]
    assert not [path for path in (tmp_path / "bucket" / "out").rglob("*") if path.is_file()]

    again = start(toy_gpt2, tmp_path)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "tokenize: already done" in said
    assert (tmp_path / "bucket" / "out" / "gpt2-ye-trump-Q2_K.gguf").exists()
