"""What each way of compressing costs in quality: ours beside the stock tools', on held-out text.

    python scripts/bench_quality.py --json FILE                  both parts
    python scripts/bench_quality.py --part chain --input FOLDER  a GPT-2 tuned on quotes, down to the Q2_K file
    python scripts/bench_quality.py --part prose                 a pretrained SmolLM2 on general prose

`chain` takes the GPT-2 that BASE_MODEL or STANDIN_GPT2 names. What is already in --work is not made again, so a
bench that was stopped goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as entrypoint.py does, before torch is imported

import torch  # noqa: E402
from quality_chain import chain  # noqa: E402
from quality_prose import Bench, Effort, minutes_and_losses, steps  # noqa: E402

from pipeline import logs, metrics  # noqa: E402
from pipeline.base_model import obtain  # noqa: E402
from pipeline.config import ModelConfig  # noqa: E402
from pipeline.device import choose_device  # noqa: E402
from pipeline.report import interval, size  # noqa: E402


def prose_rows(work: Path) -> list[dict[str, Any]]:
    script = subprocess.run([ROOT / "scripts/fetch_offline_model.sh"], check=True, capture_output=True, text=True)
    model = work / "smollm2"
    if not model.exists():
        model.mkdir(parents=True)
        obtain(ModelConfig(base=script.stdout.strip()), out=model)
    return steps(Bench(model, work / "prose", choose_device("auto").name, Effort()))


def show_prose(rows: list[dict[str, Any]]) -> None:
    body = [
        [
            row["step"],
            interval(row["ppl_ratio"], ".3f"),
            interval(row["perplexity"], ".1f"),
            f"{row['zeros']:.3f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_memory_bytes'] / 1024**3:.1f}",
        ]
        for row in rows
    ]
    click.echo("\nSmolLM2-135M, general prose; perplexity against dense (95%)")
    click.echo(markdown(("step", "ratio (95%)", "perplexity (95%)", "zeros", "seconds", "GiB"), body))
    points = [[f"{minutes:.1f}", step, f"{kl:.4f}"] for minutes, step, kl in minutes_and_losses(rows)]
    click.echo("\n" + markdown(("minutes", "step", "validation KL, nats a token"), points))


def show_chain(rows: list[dict[str, Any]]) -> None:
    body = [
        [
            row["way"],
            interval(row["ppl_ratio"], ".3f"),
            interval(row["perplexity"], ".1f"),
            f"{row['kl_mean']:.4f}",
            f"{row['zeros']:.3f}",
            size(row["size_bytes"]),
            f"{sum(row['seconds'].values()):.0f}",
            f"{row['peak_memory_bytes'] / 1024**3:.1f}",
        ]
        for row in rows
    ]
    click.echo(f"\nGPT-2 tuned on quotes, {rows[0]['tokens']} held-out tokens; perplexity against tuned (95%)")
    click.echo(markdown(("way", "ratio (95%)", "perplexity (95%)", "KL", "zeros", "size", "seconds", "GiB"), body))


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as the README has it."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows))


@click.command()
@click.option("--part", type=click.Choice(["chain", "prose", "both"]), default="both", show_default=True)
@click.option("--input", "inputs", multiple=True, help="Quote files or folders. [default: the sample corpus]")
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/bench_quality"), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.argument("extra", nargs=-1)
def main(part: str, inputs: tuple[str, ...], work: Path, json_path: Path | None, extra: tuple[str, ...]) -> None:
    """Measure the quality of every way of compressing. EXTRA SETTING=VALUE pairs go to every run of `chain`."""
    logs.configure("text")
    found: dict[str, Any] = {"hardware": metrics.hardware(), "torch": torch.__version__}
    if part != "prose":
        base = os.environ.get("BASE_MODEL") or os.environ.get("STANDIN_GPT2")
        if not base:
            raise click.UsageError("set BASE_MODEL to a GPT-2: a hub id or a folder; or choose --part prose")
        more = dict(pair.split("=", 1) for pair in extra)
        found["chain"] = chain(base, inputs, work / "chain", more)
        show_chain(found["chain"])
    if part != "chain":
        found["prose"] = prose_rows(work)
        show_prose(found["prose"])
    if json_path:
        json_path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
