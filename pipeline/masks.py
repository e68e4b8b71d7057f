"""Which weights stay, from their scores: exact counts, whatever the ties."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_mask(scores: Tensor, ratio: float) -> Tensor:
    """True where a weight stays; exactly round(ratio * n) of the lowest `scores` (any shape) are False."""
    dropped = round(ratio * scores.numel())
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    # A stable sort, not a threshold: with ties a threshold zeroes more or fewer than asked for.
    mask[torch.argsort(scores.flatten(), stable=True)[:dropped]] = False
    return mask.view(scores.shape)


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
