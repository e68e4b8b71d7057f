from __future__ import annotations

import json

from click.testing import CliRunner

from scripts import bench_storage


def test_the_bench_compares_both_schemes_with_their_plain_clients() -> None:
    result = CliRunner().invoke(bench_storage.main, ["--megabytes", "1", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["rows"]
    assert [(row["scheme"], row["way"]) for row in rows] == [("gs", "up"), ("gs", "down"), ("s3", "up"), ("s3", "down")]
    for row in rows:
        assert row["ours_mb_per_second"] > 0 and row["plain_mb_per_second"] > 0
        assert row["ratio"] == row["ours_mb_per_second"] / row["plain_mb_per_second"]
    # Ours looks an object up before it reads it; a small write is one request.
    assert [row["ours_requests"] for row in rows] == [1, 2, 1, 2]


def test_the_bench_prints_a_table_with_units() -> None:
    result = CliRunner().invoke(bench_storage.main, ["--megabytes", "1", "--rounds", "1", "--scheme", "gs"])
    assert result.exit_code == 0, result.output
    assert "ours, MB/s" in result.output and "ours/plain" in result.output
