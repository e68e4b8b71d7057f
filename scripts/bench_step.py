"""A step of distilling on a CPU, by how threads wait and what becomes of freed memory.

    python scripts/bench_step.py

Each way is a process of its own, and all take turns, on GPT-2's shape with random weights: right for time and memory.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline import heap  # noqa: E402
from pipeline.openmp import WAITING  # noqa: E402
from pipeline.report import table  # noqa: E402

SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}
# Environment of the process, and whether freed memory is reused. The last one is the job's.
WAYS: dict[str, tuple[dict[str, str], bool]] = {
    "as the libraries do": ({}, False),
    "threads sleep at once": (SLEEPING, False),
    "threads spin briefly": (WAITING, False),
    "threads sleep at once, memory reused": (SLEEPING, True),
    "threads spin briefly, memory reused": (WAITING, True),
}


def once(steps: int, tokens: int, layers: int, width: int, reuse: bool) -> dict[str, Any]:
    """Mean seconds of a step behind the first, and the peak of this process's memory in bytes."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from pipeline.device import arithmetic_of
    from pipeline.distill import Group, Recipe, descend, divergence, endless, optimizer_of
    from pipeline.matrices import ids_of_embeddings
    from pipeline.meter import peak_of_process

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=max(1, width // 64))
    student, teacher = (GPT2LMHeadModel(config).eval() for _ in range(2))
    generator = random.Random(0)
    lengths = [generator.randrange(16, 257) for _ in range(64)]
    texts = [torch.randint(config.vocab_size, (length,)).tolist() for length in lengths]
    recipe = Recipe(steps, tokens, 1e-5, steps, arithmetic_of("auto", "cpu").name, 0)
    fixed = ids_of_embeddings(student)
    trained = [parameter for parameter in student.parameters() if id(parameter) not in fixed]
    student.get_input_embeddings().requires_grad_(False)  # the head too
    optimizer, seconds = optimizer_of([Group(trained)], recipe), []
    with heap.reused() if reuse else nullcontext():
        for batch in islice(endless(texts, tokens, seed=0), steps + 1):
            started = time.monotonic()
            loss, _ = divergence(student, teacher, batch, recipe)
            descend(loss, trained, optimizer)
            seconds.append(time.monotonic() - started)
    return {"seconds": mean(seconds[1:]), "peak_bytes": peak_of_process()}


def in_a_process(way: str, shape: list[str]) -> dict[str, Any]:
    environment, reuse = WAYS[way]
    ours = {key: value for key, value in os.environ.items() if key not in WAITING}
    command = [sys.executable, __file__, *shape, "--once", "reuse" if reuse else "leave"]
    found = subprocess.run(command, env=ours | environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(found.stdout)
    return result


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Processes for each way.")
@click.option("--steps", default=12, show_default=True, help="Steps in each, behind a first one that is not counted.")
@click.option("--tokens", default=512, show_default=True, help="Of a step, at most: texts differ in length.")
@click.option("--layers", default=12, show_default=True)
@click.option("--width", default=768, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--once", "one", type=click.Choice(["reuse", "leave"]), hidden=True)
def main(
    rounds: int, steps: int, tokens: int, layers: int, width: int, json_path: Path | None, one: str | None
) -> None:
    """Time a step of distilling in every way."""
    if one:
        click.echo(json.dumps(once(steps, tokens, layers, width, one == "reuse")))
        return
    shape = [f"--steps={steps}", f"--tokens={tokens}", f"--layers={layers}", f"--width={width}"]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            found[way].append(in_a_process(way, shape))
    seconds = {way: median(each["seconds"] for each in results) for way, results in found.items()}
    *_, ours = seconds.values()
    rows = [
        [way, f"{value:.2f}", f"{value / ours:.2f}", f"{max(each['peak_bytes'] for each in found[way]) / 1024**3:.2f}"]
        for way, value in seconds.items()
    ]
    click.echo(table(("way", "seconds a step", "to the job's", "peak GiB"), rows))
    if json_path:
        json_path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
