"""Two starts of the same run as processes: one is killed, the other goes on."""

import signal

import pytest

from pipeline.publish import verify
from tests.test_signals import start, wait_for


@pytest.mark.slow
@pytest.mark.fault(
    "processes and whole runs", "two starts of one run, the first killed", "one works at a time, the next goes on"
)
def test_one_of_two_starts_works_and_when_it_is_killed_another_goes_on(small_model, tmp_path):
    from tests.test_job import QUOTES, write_bucket

    write_bucket(f"{tmp_path}/bucket/in", QUOTES, tmp_path)
    small_model = small_model | {"lease.seconds": "3600"}
    first = start(small_model, tmp_path)
    wait_for(first, "finetune: started")
    first.send_signal(signal.SIGSTOP)  # it would be done before the others have imported what they need

    elsewhere = start(small_model, tmp_path, "--work-dir", f"{tmp_path}/elsewhere")
    same_folder = start(small_model, tmp_path)
    _, said = elsewhere.communicate(timeout=900)
    assert elsewhere.returncode == 75 and f"is being done by process {first.pid} on" in said
    _, said = same_folder.communicate(timeout=900)
    assert same_folder.returncode == 75 and f"is in use by process {first.pid} on" in said

    first.kill()
    first.communicate()
    next_one = start(small_model, tmp_path)
    _, said = next_one.communicate(timeout=1800)
    assert next_one.returncode == 0 and "is taken over from process" in said, said
    assert verify(f"{tmp_path}/bucket/out")
    left = {path.name for path in tmp_path.rglob("*")}
    assert not {"LEASE.json", "IN_USE", "FAILURE.json"} & left
    assert len(list((tmp_path / "bucket" / "out" / "runs").iterdir())) == 1
