import json

import pytest
from click.testing import CliRunner

from scripts import bench_step


@pytest.mark.slow
def test_the_bench_times_a_step_in_every_way_and_the_jobs_is_one(tmp_path):
    small = ["--rounds", "1", "--steps", "1", "--tokens", "64", "--layers", "1", "--width", "64"]
    ended = CliRunner().invoke(bench_step.main, [*small, "--json", str(tmp_path / "found.json")])
    assert ended.exit_code == 0, ended.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == list(bench_step.WAYS)
    assert all(each["seconds"] > 0 and each["peak_bytes"] > 10**8 for (each,) in found.values())
    *_, last = ended.output.strip().splitlines()
    assert "spin briefly, memory reused" in last and " 1.00 " in last
