"""Pruning methods, one file each: `scores(weight (out, in) float32, generator) -> Tensor (out, in)`; weights
with the lowest scores go first. The file name is the method's name in `sparsity.method`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from torch import Generator, Tensor

Scores = Callable[[Tensor, Generator], Tensor]


def methods() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def load(method: str) -> Scores:
    scores: Scores = import_module(f"pipeline.sparsity.{method}").scores
    return scores
