"""What each way of compressing costs in quality: ours beside the stock tools', on held-out text.

    python scripts/bench_quality.py --json FILE                  both parts
    python scripts/bench_quality.py --part chain --input FOLDER  a GPT-2 tuned on quotes, down to the Q2_K file
    python scripts/bench_quality.py --part prose                 a pretrained model on general prose

Both take the model that BASE_MODEL names: a hub id (openai-community/gpt2) or a folder. Without it, `chain` takes the
GPT-2 that STANDIN_GPT2 names, and `prose` the pretrained SmolLM2-135M of a PyPI wheel. What the same code has made in
--work is not made again, so a bench that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from pipeline import openmp  # noqa: E402

openmp.spin_briefly()  # as entrypoint.py does, before torch is imported

import prose  # noqa: E402
import quality_prose  # noqa: E402
import torch  # noqa: E402
from quality_chain import chain  # noqa: E402
from quality_prose import Bench, Effort, minutes_and_losses, steps  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from pipeline import logs, metrics, stage  # noqa: E402
from pipeline.base_model import obtain  # noqa: E402
from pipeline.config import ModelConfig  # noqa: E402
from pipeline.device import choose_device  # noqa: E402
from pipeline.errors import QuotesmithError  # noqa: E402
from pipeline.report import interval, size  # noqa: E402

OFFLINE = "SmolLM2-135M"


def prose_rows(base: str, work: Path) -> list[dict[str, Any]]:
    """`base` is a hub id, a folder or `OFFLINE`; each has a folder of its own in `work`."""
    folder = work / re.sub(r"\W+", "-", base).strip("-").lower()
    model = folder / "base"
    if not (model / "config.json").exists():
        model.mkdir(parents=True, exist_ok=True)
        obtain(ModelConfig(base=offline_model() if base == OFFLINE else base), out=model)
    return steps(Bench(model, folder / f"prose-{code()}", choose_device("auto").name, Effort()))


def code() -> str:
    """A hash of what makes the rows of prose: one of other code is another row, whatever its name."""
    files = b"".join(Path(module.__file__ or "").read_bytes() for module in (quality_prose, prose))
    return hashlib.sha256(stage.code_digest().encode() + files).hexdigest()[:16]


def offline_model() -> str:
    script = subprocess.run([ROOT / "scripts/fetch_offline_model.sh"], check=True, stdout=subprocess.PIPE, text=True)
    return script.stdout.strip()


def show_prose(base: str, rows: list[dict[str, Any]]) -> None:
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
    click.echo(f"\n{base}, general prose; perplexity against dense (95%)")
    click.echo(markdown(("step", "ratio (95%)", "perplexity (95%)", "zeros", "seconds", "GiB"), body))
    first: dict[str, float] = {}  # of each training
    points = [
        [f"{minutes:.1f}", step, f"{kl:.4f}", f"{1 - kl / first.setdefault(step, kl):.0%}"]
        for minutes, step, kl in minutes_and_losses(rows)
    ]
    click.echo("\n" + markdown(("minutes", "step", "validation KL, nats a token", "closed"), points))


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
    disable_progress_bar()  # one for every model that is loaded
    named = os.environ.get("BASE_MODEL", "").replace("offline", "")  # as scripts/run_local.sh understands it
    found: dict[str, Any] = {"hardware": metrics.hardware(), "torch": torch.__version__}
    try:
        if part != "prose":
            base = named or os.environ.get("STANDIN_GPT2")
            if not base:
                raise click.UsageError("set BASE_MODEL to a GPT-2: a hub id or a folder; or choose --part prose")
            more = dict(pair.split("=", 1) for pair in extra)
            found["chain"] = chain(base, inputs, work / "chain", more)
            show_chain(found["chain"])
        if part != "chain":
            base = named or OFFLINE
            found["prose"] = prose_rows(base, work)
            show_prose(base, found["prose"])
    except QuotesmithError as e:  # no hub, for instance
        click.echo(f"bench_quality: {e}", err=True)
        sys.exit(e.exit_code)
    if json_path:
        json_path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
