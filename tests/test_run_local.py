"""The README's first command, for real, on a toy base model."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_one_command_ends_with_the_ledger_three_quotes_and_the_files(toy_gpt2, llama_cpp, tmp_path):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("QUOTESMITH_", "VIRTUAL_ENV"))}
    command = ["scripts/run_local.sh", "--train.max-steps", "1", "--evaluate.max-new-tokens", "8"]
    command += ["--calibration.generated", "8", "--calibration.max-tokens", "2000", "--evaluate.max-quotes", "20"]
    command += ["--recover.steps", "1", "--finish.steps", "1", "--quantize.encoder", "llama.cpp"]
    command += ["--work-dir", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env={**clean, "BASE_MODEL": str(toy_gpt2)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "because BASE_MODEL says so" in done.stderr
    assert all(
        f"\n{stage} " in done.stdout
        for stage in ("base", "tuned", "nf4", "pruned", "recovered", "F16", "quantized Q2_K", "finished Q2_K")
    )
    assert done.stdout.count("“") >= 3
    assert (tmp_path / "out" / "sample-voices-Q2_K.gguf").stat().st_size > 1_000_000
    assert f"{tmp_path}/out/metrics.json" in done.stdout


@pytest.mark.slow
def test_a_mistyped_option_passes_through_and_ends_with_2(toy_gpt2, llama_cpp):
    done = subprocess.run(
        ["scripts/run_local.sh", "--train.epoch", "1"],
        cwd=ROOT,
        env={**os.environ, "BASE_MODEL": str(toy_gpt2)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--train.epochs" in done.stderr
