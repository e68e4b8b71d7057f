"""Work on the rows of a matrix in parts: what our encoder does to one row is independent of all others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def in_parts(work: Callable[[Tensor], T], rows: int, at_most: int, device: torch.device) -> list[T]:
    """`work(indices)` over all rows in order, `at_most` rows at once, which bounds its memory. No gradients.

    On a CPU the parts run side by side with one thread each: a column at a time is so little work that torch's own
    threads spend longer waking up than working (measured on 2 cores: 1.75 times as fast).
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    parts = torch.split(torch.arange(rows, device=device), max(1, min(at_most, -(-rows // threads))))

    def alone(indices: Tensor) -> T:
        if threads > 1:
            torch.set_num_threads(1)  # of this thread of the pool
        with torch.no_grad():
            return work(indices)

    if threads == 1:
        return [alone(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(alone, parts))
