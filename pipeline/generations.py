"""What the model writes: does it stop by itself, repeat itself, copy its training text?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

REPEAT_WORDS = 4  # seq-rep-4 of Welleck et al., arXiv:1908.04319
COPY_WORDS = 6  # a run this long shared with the training text is a quotation, not a turn of phrase

Words = tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    prompt: str
    seed: int
    text: str  # prompt included
    stopped: bool  # by its own end token, before the limit of new tokens


def describe(samples: list[Sample], training: Iterable[str]) -> dict[str, Any]:
    """Shares over all samples, and the samples themselves."""
    copied = copied_shares([words(sample.text) for sample in samples], training)
    return {
        "stop_rate": mean([sample.stopped for sample in samples]),
        "repeat_share": mean([repeated_share(words(sample.text)) for sample in samples]),
        "copied_share": mean(copied),
        "copied_run_words": COPY_WORDS,
        "samples": [asdict(sample) for sample in samples],
    }


def mean(values: list[float] | list[bool]) -> float:
    return sum(values) / len(values)


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())


def runs(of: list[str], length: int) -> Iterator[Words]:
    return (tuple(of[i : i + length]) for i in range(len(of) - length + 1))


def repeated_share(of: list[str]) -> float:
    """Share of runs of four words that occurred before in the same text."""
    found = list(runs(of, REPEAT_WORDS))
    return 1 - len(set(found)) / len(found) if found else 0.0


def copied_shares(texts: list[list[str]], training: Iterable[str]) -> list[float]:
    """For each text, the share of its words inside a run of `COPY_WORDS` that the training text has too.

    The generated runs are what is kept and looked for: they are few, however large the training text is.
    """
    wanted = {run for text in texts for run in runs(text, COPY_WORDS)}
    seen = {run for quote in training for run in runs(words(quote), COPY_WORDS) if run in wanted}
    return [covered(text, seen) for text in texts]


def covered(text: list[str], seen: set[Words]) -> float:
    inside = {j for i, run in enumerate(runs(text, COPY_WORDS)) if run in seen for j in range(i, i + COPY_WORDS)}
    return len(inside) / len(text) if text else 0.0
