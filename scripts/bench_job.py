"""The whole job, stage by stage: seconds and peak memory, on the offline model and on GPT-2's shape.

    python scripts/bench_job.py --input FOLDER        the quote files; default: the sample corpus

Runs `entrypoint.py run` as a user would, in a fresh work folder, and reads what it published. GPT-2's shape has
random weights where no hub answers: right for time, memory, sizes and counts, meaningless for quality.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from make_random_gpt2 import make  # noqa: E402

from pipeline import llama_cpp  # noqa: E402
from pipeline.report import size, table  # noqa: E402


def run_job(base: Path, inputs: tuple[str, ...], folder: Path, extra: tuple[str, ...]) -> dict[str, Any]:
    """metrics.json of one run, with its wall time (s) and peak memory (bytes), tools at work included."""
    command = [sys.executable, ROOT / "entrypoint.py", "run", "--model.base", base, "--output", folder / "out"]
    command += ["--work-dir", folder / "work", *(f"--input={item}" for item in inputs), *extra]
    started = time.monotonic()
    peak = watch(psutil.Popen(command, stdout=subprocess.DEVNULL))
    metrics: dict[str, Any] = json.loads((folder / "out" / "metrics.json").read_text())
    return metrics | {"wall_seconds": time.monotonic() - started, "peak_bytes": peak}


def watch(job: psutil.Popen) -> int:
    """The highest sum of resident memory (bytes) of the job and its children, sampled five times a second."""
    peak = 0
    while job.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(process.memory_info().rss for process in (job, *job.children(recursive=True))))
        time.sleep(0.2)
    if job.returncode:
        raise SystemExit(job.returncode)
    return peak


def show(title: str, metrics: dict[str, Any]) -> None:
    rows = [
        [stage["name"], f"{stage['seconds']:.1f}", f"{stage['peak_memory_bytes'] / 1024**3:.2f}"]
        for stage in metrics["stages"]
    ]
    rows.append(["whole job", f"{metrics['wall_seconds']:.1f}", f"{metrics['peak_bytes'] / 1024**3:.2f}"])
    click.echo(f"\n{title}; {metrics['hardware']['cpu']}, {metrics['hardware']['cores']} cores")
    click.echo(table(("stage", "seconds", "peak GiB"), rows))
    facts = {stage["name"]: stage["facts"] for stage in metrics["stages"]}
    for gguf in metrics["ggufs"]:
        fallbacks = len(gguf["facts"]["fallbacks"])
        click.echo(
            f"{gguf['name']}: {size(gguf['size_bytes'])}, {facts['export']['tensors']} tensors, "
            f"{facts['sparsify']['matrices']} matrices pruned to {facts['sparsify']['zeros']:.6f}, "
            f"{fallbacks} tensors in a fallback type"
        )


@click.command()
@click.option("--input", "inputs", multiple=True, help="Quote files or folders. [default: the sample corpus]")
@click.option("--model", type=click.Choice(["offline", "gpt2-shape", "both"]), default="both")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.argument("extra", nargs=-1)
def main(inputs: tuple[str, ...], model: str, json_path: Path | None, extra: tuple[str, ...]) -> None:
    """Time the whole job. EXTRA options after -- go to every run."""
    results = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        if model != "gpt2-shape":
            path = subprocess.run([ROOT / "scripts/fetch_offline_model.sh"], check=True, capture_output=True, text=True)
            results["offline model"] = run_job(Path(path.stdout.strip()), inputs, folder / "offline", extra)
        if model != "offline":
            make(folder / "gpt2", llama_cpp.find().root / "models" / "ggml-vocab-gpt-2.gguf")
            results["GPT-2's shape, random weights"] = run_job(folder / "gpt2", inputs, folder / "gpt2-run", extra)
    for title, metrics in results.items():
        show(title, metrics)
    if json_path:
        json_path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
