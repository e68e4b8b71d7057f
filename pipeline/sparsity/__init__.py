"""Pruning methods, one file each: `prune(weight (out, in) float32, gram, target, generator) -> Tensor (out, in)`.

The file name is the method's name in `sparsity.method`. A method that only ranks weights also has
`scores(weight, generator)`, lowest first, so that one threshold can be set over all matrices.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

NEED_NO_TEXT = ("magnitude", "random")


def methods() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def load(method: str) -> ModuleType:
    return import_module(f"pipeline.sparsity.{method}")
