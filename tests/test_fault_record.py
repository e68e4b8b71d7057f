import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TESTS = """
import pytest

@pytest.mark.fault("files", "torn", "refused")
@pytest.mark.parametrize("how", range(3))
def test_one(how):
    assert how < 2

def test_many(record_fault):
    record_fault("jobs", "SIGKILL", "went on", 40)
    record_fault("jobs", "SIGKILL", "went on", 2)

def test_fails(record_fault):
    record_fault("jobs", "SIGTERM", "went on")
    assert False
"""


def run(folder, *arguments, tests=TESTS, **environment):
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "tests" / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.fault_record", "-p", "no:cacheprovider"]
    command += ["--rootdir", folder, "--faults", folder / "faults", *arguments]
    environment |= {"PYTHONPATH": str(ROOT), "PATH": ""}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return [json.loads(line) for line in (folder / "faults").read_text().splitlines()]


@pytest.mark.parametrize("processes", [(), ("--numprocesses", "2")])
def test_faults_of_tests_that_passed_are_counted_by_kind(processes, tmp_path):
    head, *found = run(tmp_path, *processes)
    assert not head["complete"]  # a test failed
    assert [(each["group"], each["fault"], each["count"]) for each in found] == [
        ("files", "torn", 2),
        ("jobs", "SIGKILL", 42),
    ]


def test_only_a_run_of_all_tests_that_passes_is_complete(tmp_path):
    assert not run(tmp_path, "-k", "many")[0]["complete"]
    passing = "def test_it(): pass"
    assert run(tmp_path, tests=passing)[0]["complete"]
    assert not run(tmp_path, "tests/test_it.py", tests=passing)[0]["complete"]


def test_the_head_says_whether_every_fault_was_tried(tmp_path):
    passing = "def test_it(): pass"
    assert run(tmp_path, tests=passing)[0]["every_fault"] is False
    assert run(tmp_path, tests=passing, EVERY_FAULT="1")[0]["every_fault"] is True
