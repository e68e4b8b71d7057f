"""Long texts out of short ones: quotes behind other quotes."""

from __future__ import annotations

import random
from collections.abc import Sequence

Sequences = Sequence[Sequence[int]]


def joined(sequences: Sequences, seed: int) -> list[int]:
    """All of them in a random order, each without its begin token: the end token before it tells them apart."""
    order = random.Random(seed).sample(range(len(sequences)), len(sequences))
    return [token for number in order for token in sequences[number][1:]]


def window(before: Sequence[int], sequences: Sequences, length: int) -> list[int]:
    """`length` tokens: the begin token, as much of the end of `before` as fits, then `sequences` as in `joined`.

    Raises `ValueError` when `before` is too short to fill it, or `sequences` too long to fit.
    """
    own = [token for ids in sequences for token in ids[1:]]
    room = length - 1 - len(own)
    if not 0 <= room <= len(before):
        raise ValueError(f"{len(before)} tokens before {len(own)} of the text do not make a window of {length}")
    return [sequences[0][0], *before[len(before) - room :], *own]


def batches(sequences: Sequences, most_tokens: int) -> list[list[Sequence[int]]]:
    """Whole sequences in their order, cut to `most_tokens` and at most that many together, begin tokens not counted."""
    found: list[list[Sequence[int]]] = []
    left = 0
    for ids in sequences:
        ids = ids[: most_tokens + 1]
        if len(ids) - 1 > left:
            found.append([])
            left = most_tokens
        found[-1].append(ids)
        left -= len(ids) - 1
    return found
