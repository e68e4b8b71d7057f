"""Which weights stay, from their scores: exact counts, whatever the ties."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """How many weights go: a share of them all, or all but `kept` of every `group` neighbours in a row."""

    ratio: float
    kept: int = 0
    group: int = 0  # 0: unstructured

    def mask(self, scores: Tensor) -> Tensor:
        """True where a weight stays; `scores` (out, in) are compared over the whole matrix."""
        return n_of_m_mask(scores, self.kept, self.group) if self.group else keep_mask(scores, self.ratio)

    def row_mask(self, scores: Tensor) -> Tensor:
        """The same, compared within each row."""
        return n_of_m_mask(scores, self.kept, self.group) if self.group else row_mask(scores, self.ratio)

    def column_mask(self, scores: Tensor, start: int, width: int) -> Tensor:
        """For a block of columns that begins at `start` of a matrix `width` wide: its share, so that the counts of
        all blocks add up to the matrix's exactly. All True for n:m, which is chosen group by group."""
        if self.group:
            return torch.ones_like(scores, dtype=torch.bool)
        rows, end = scores.shape[0], start + scores.shape[1]
        total = round(self.ratio * rows * width)
        return drop_lowest(scores, round(total * end / width) - round(total * start / width))

    def whole_groups(self, columns: int) -> int:
        """At most `columns`, in whole groups."""
        return max(columns // self.group, 1) * self.group if self.group else columns


def drop_lowest(scores: Tensor, dropped: int) -> Tensor:
    """True but for the `dropped` lowest `scores` (any shape)."""
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    # A stable sort, not a threshold: with ties a threshold zeroes more or fewer than asked for.
    mask[torch.argsort(scores.flatten(), stable=True)[:dropped]] = False
    return mask.view(scores.shape)


def keep_mask(scores: Tensor, ratio: float) -> Tensor:
    """True where a weight stays; exactly round(ratio * n) of the lowest `scores` (any shape) are False."""
    return drop_lowest(scores, round(ratio * scores.numel()))


def row_mask(scores: Tensor, ratio: float) -> Tensor:
    """As `keep_mask`, but each row of `scores` (out, in) loses its own share, to within one weight."""
    rows, width = scores.shape
    ends = [round(round(ratio * rows * width) * (i + 1) / rows) for i in range(rows)]
    counts = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)], device=scores.device)
    ranks = torch.argsort(torch.argsort(scores, dim=1, stable=True), dim=1)
    return ranks >= counts[:, None]


def n_of_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """True for the `n` highest of every `m` neighbours along the input side; `scores` is (out, in), m | in."""
    groups = scores.reshape(-1, m)
    best = torch.argsort(groups, dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view(scores.shape)


def global_masks(scores: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """One threshold for all: exactly round(ratio * total) of the lowest scores over all matrices are False."""
    flat = keep_mask(torch.cat([score.flatten().cpu() for score in scores.values()]), ratio)
    parts = torch.split(flat, [score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)
    }
