"""Two starts of the same run as processes: one is killed, the other goes on."""

import pytest

from pipeline.publish import verify
from tests.test_signals import start, wait_for


@pytest.mark.slow
@pytest.mark.fault(
    "processes and whole runs", "two starts of one run, the first killed", "one works at a time, the next goes on"
)
def test_one_of_two_starts_works_and_when_it_is_killed_another_goes_on(toy_gpt2, llama_cpp, tmp_path):
    from tests.test_job import QUOTES, write_bucket

    toy = {"model.base": str(toy_gpt2)}
    write_bucket(f"{tmp_path}/bucket/in", QUOTES, tmp_path)
    first = start(toy, tmp_path)
    wait_for(first, "finetune: started")

    elsewhere = start(toy, tmp_path, "--work-dir", f"{tmp_path}/elsewhere")
    same_folder = start(toy, tmp_path)
    _, said = elsewhere.communicate(timeout=900)
    assert elsewhere.returncode == 75 and f"is being done by process {first.pid} on" in said
    _, said = same_folder.communicate(timeout=900)
    assert same_folder.returncode == 75 and f"is in use by process {first.pid} on" in said

    first.kill()
    first.communicate()
    next_one = start(toy, tmp_path)
    _, said = next_one.communicate(timeout=1800)
    assert next_one.returncode == 0 and "is taken over from process" in said, said
    assert verify(f"{tmp_path}/bucket/out")
    left = {path.name for path in tmp_path.rglob("*")}
    assert not {"LEASE.json", "IN_USE", "FAILURE.json"} & left
    assert len(list((tmp_path / "bucket" / "out" / "runs").iterdir())) == 1
