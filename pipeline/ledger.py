"""One row a step, all over the same held-out quotes: perplexity, and the change against the tuned model.

The quotes are few, so every figure has a 95% percentile-bootstrap interval over quotes (Efron & Tibshirani
1993, ch. 13); the change is resampled in pairs, the same quotes for both models, which makes it far tighter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.scoring import Scores

Measured = float | dict[str, Any]  # a number, or {"value": None, "reason": why there is none}


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """`kl_mean` is in nats a token, `same_top` and `zeros` are shares from 0 to 1."""

    stage: str  # base, tuned, nf4, pruned, recovered, F16, quantized, finished
    file: str | None
    type: str | None  # of the file
    engine: str
    quotes: int
    tokens: int
    perplexity: Interval
    bits_per_byte: float
    ppl_ratio: Interval  # against the tuned model; 1 is no change
    kl_mean: float
    same_top: float
    size_bytes: int
    bits_per_weight: float
    zeros: Measured  # share of the block matrices' weights that are exactly zero


def missing(reason: str) -> dict[str, Any]:
    return {"value": None, "reason": reason}


def resample(quotes: int, times: int, seed: int) -> np.ndarray:
    """(times, quotes): how often each quote is drawn in each resample."""
    return np.random.default_rng(seed).multinomial(quotes, np.full(quotes, 1 / quotes), size=times)


def perplexity(scores: Scores, draws: np.ndarray) -> Interval:
    return interval(scores.nll, scores.tokens, draws)


def ppl_ratio(scores: Scores, tuned: Scores, draws: np.ndarray) -> Interval:
    return interval(scores.nll - tuned.nll, scores.tokens, draws)


def interval(nats: np.ndarray, tokens: np.ndarray, draws: np.ndarray) -> Interval:
    """exp(nats a token) with its 2.5th and 97.5th percentile over the draws."""
    low, high = np.percentile((draws @ nats) / (draws @ tokens), [2.5, 97.5])
    return Interval(*(safe_exp(x) for x in (nats.sum() / tokens.sum(), low, high)))


def safe_exp(nats: float) -> float:
    """A ruined model can have more nats a token than a float can take the exponential of."""
    return math.exp(min(float(nats), 700.0))


def bits_per_byte(scores: Scores, text_bytes: int) -> float:
    return float(scores.nll.sum() / math.log(2) / text_bytes)
