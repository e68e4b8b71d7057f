"""The whole job, once for each way of compressing, on a GPT-2 tuned on quotes: real Q2_K files, scored by llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import job
from pipeline.settings import resolve

STEPS = ("sparsify", "recover", "extend", "quantize", "adapt", "finish")
FIGURES = ("perplexity", "ppl_ratio", "kl_mean", "same_top", "size_bytes", "zeros", "tokens")
METHODS = ("random", "magnitude", "wanda", "sparsegpt")
STOCK = {
    "sparsity.refit": "false",
    "recover.steps": "0",
    "adapt.steps": "0",
    "finish.steps": "0",
    "quantize.encoder": "llama.cpp",
}
NO_IMPORTANCE = {**STOCK, "quantize.importance": "false"}

AS_ENCODED = {"adapt.steps": "0", "finish.steps": "0"}

DEFAULT = "the default: all of it"
BUDGET = 0.92  # of the default's bytes

# What a way is called, and its settings where they differ from the defaults.
WAYS: dict[str, dict[str, str]] = {
    **{f"{method}, stock Q2_K": {**NO_IMPORTANCE, "sparsity.method": method} for method in METHODS},
    **{f"{method}, stock Q2_K with importance matrix": {**STOCK, "sparsity.method": method} for method in METHODS},
    "refit, our encoder": {"recover.steps": "0", **AS_ENCODED},
    "refit, recovery, stock Q2_K with importance matrix": {**AS_ENCODED, "quantize.encoder": "llama.cpp"},
    "refit, recovery, our encoder": AS_ENCODED,
    "the same, adapted": {"finish.steps": "0"},
    "the same, vectors finished": {"finish.train": "vectors"},
    DEFAULT: {},
    "the default, zeros kept": {"sparsity.keep_zeros": "true"},
    "the default, 4,096 positions": {"export.context": "4096", "export.context_steps": "20"},
}


def chain(model: str, inputs: Sequence[str], work: Path, more: dict[str, str]) -> list[dict[str, Any]]:
    """One row a way: the ledger's last, with the seconds and the peak memory of the steps that made the file.

    `more` are settings of every way; where a way is named after one, its own stands. The last way is the default with a
    budget below its size.
    """
    rows = {name: run(name, {**more, **settings}, model, inputs, work) for name, settings in WAYS.items()}
    limit = budget_below(rows[DEFAULT]["size_bytes"])
    name = f"the default, in {limit / 1e6:g} MB"
    return [*rows.values(), run(name, {**more, "quantize.max_bytes": str(limit)}, model, inputs, work)]


def budget_below(size_bytes: int) -> int:
    """In two digits: 14 MB for the small GPT-2's 15.3 MB, 65 MB for the 70.7 MB of GPT-2 itself."""
    most = BUDGET * size_bytes
    unit = 10 ** (math.floor(math.log10(most)) - 1)
    return int(most // unit * unit)


def run(name: str, settings: dict[str, str], model: str, inputs: Sequence[str], work: Path) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "model.base": model,
        "input": list(inputs),
        "work_dir": str(work / "work"),
        "output": str(work / "out"),
        "fourbit.enabled": "false",
        "evaluate.samples": "1",
        **settings,
    }
    figures = job.run(resolve(flags, {})).metrics
    last, facts = figures["ledger"][-1], figures["ggufs"][-1]["facts"]
    compressing = [stage for stage in figures["stages"] if stage["name"] in STEPS]
    return {
        "way": name,
        **{key: last[key] for key in FIGURES},
        "seconds": {stage["name"]: stage["seconds"] for stage in compressing},
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in compressing),
        "budget": facts.get("budget"),
        "zeros_cost": facts.get("zeros_cost"),
        "long_context": figures["long_context"],
    }
