"""What a file's perplexity does when quotes stand far back in a long text, through llama.cpp itself."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import ledger, llama_cpp
from pipeline.llama_cpp import LlamaCpp
from pipeline.long_text import Sequences, batches, joined, window
from pipeline.progress import bar

MOST_TOKENS = 2048  # scored; each costs, with the text before it, up to twice the sum of all contexts


def of_files(
    tools: LlamaCpp,
    files: Iterable[Path],
    positions: int,
    context: int,
    sequences: Sequences,
    before: Sequences,
    *,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """`long_context` of each file by its name; a null with its reason where no `positions` were added."""
    if context <= positions:
        return ledger.missing(f"export.context is not set: the files have the base model's {positions} positions")
    contexts = contexts_of(positions, context)
    return {
        path.name: long_context(tools, path, sequences, before, contexts, bootstrap=bootstrap, seed=seed)
        for path in files
    }


def contexts_of(positions: int, context: int) -> list[int]:
    """`positions` of the base model, doubled until `context`: 1024, 2048, 4096."""
    found = []
    while positions < context:
        found.append(positions)
        positions *= 2
    return [*found, context]


def long_context(
    tools: LlamaCpp,
    gguf: Path,
    sequences: Sequences,
    before: Sequences,
    contexts: Sequence[int],
    *,
    bootstrap: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One row a context: perplexity of the same `sequences`, each time at the end of a text of that many tokens.

    The rest of the text, before them, is of `before`, none of it twice: a text that repeats itself is easy to predict.
    What stands nearest is the same for every context; the longer ones only add text in front. `ratio` is against the
    first context, paired over the sequences, both with 95% bootstrap intervals. A null with its reason where `before`
    is too short. At most `MOST_TOKENS` are scored, in groups of half the smallest context.

    llama.cpp gives logits for every token: a context of 4,096 and GPT-2's vocabulary take 0.8 GB of memory for a while.
    """
    shuffled = random.Random(seed).sample(sequences, len(sequences))  # so that every source has its share
    groups = batches(shuffled, min(contexts) // 2)
    totals = list(accumulate(sum(len(ids) - 1 for ids in group) for group in groups))
    groups = groups[: max(1, sum(total <= MOST_TOKENS for total in totals))]
    tokens = np.array([len(ids) - 1 for group in groups for ids in group])
    draws = ledger.resample(len(tokens), bootstrap, seed)
    texts = [joined(before, seed + number) for number in range(len(groups))]
    shortest = min(sum(len(ids) - 1 for ids in group) for group in groups)
    rows: list[dict[str, Any]] = []
    first: np.ndarray | None = None
    for context in contexts:
        row: dict[str, Any] = {"context": context, "quotes": len(tokens), "tokens": int(tokens.sum())}
        needed = context - 1 - shortest
        if len(texts[0]) < needed:
            none = ledger.missing(
                f"{needed} tokens of other text before the held-out quotes are needed, there are {len(texts[0])}; "
                "raise calibration.generated or name a calibration.text"
            )
            rows.append(row | {"perplexity": none, "ratio": none})
            continue
        windows = [window(text, group, context) for text, group in zip(texts, groups, strict=True)]
        nll = np.concatenate(list(scored(tools, gguf, windows, groups)))
        first = nll if first is None else first
        perplexity = ledger.interval(nll, tokens, draws)
        rows.append(
            row | {"perplexity": asdict(perplexity), "ratio": asdict(ledger.interval(nll - first, tokens, draws))}
        )
    return rows


def scored(tools: LlamaCpp, gguf: Path, windows: Sequences, groups: Sequence[Sequences]) -> Iterator[np.ndarray]:
    """Nats of each sequence at the end of its window, summed over its tokens; one array a window."""
    tables = bar(llama_cpp.logits(tools, gguf, windows), f"long context {len(windows[0])}", len(windows))
    for table, ids, group in zip(tables, windows, groups, strict=True):
        lengths = [len(sequence) - 1 for sequence in group]
        rows = torch.from_numpy(table)[-sum(lengths) - 1 : -1]
        nats = nll_of(rows, torch.tensor(ids[-len(rows) :]))
        yield np.array([part.sum() for part in torch.split(nats, lengths)])


def nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    """(T,) float64 nats."""
    return -logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
