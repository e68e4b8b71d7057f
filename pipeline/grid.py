"""A matrix whose scales can be trained without its leaving its k-quant's grid: what it computes with is always what
the file's bytes decode to, since d and dmin of every block are rounded to float16 as they are trained.

The codes, and the stored scales and minima of the groups, stay as they were chosen. Training the codes too, by the
straight-through estimator, changed 0.00007% of SmolLM2's in 200 steps and gained nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from pipeline.kquant_fit import ZERO_RATIO, half
from pipeline.kquants import GROUP, KTYPES, KQuant, per_group
from pipeline.matrices import weight_of


class Scaled(Function):
    """step · code − minimum, with gradients for the step and the minimum."""

    @staticmethod
    def forward(ctx: Any, code: Tensor, step: Tensor, minimum: Tensor) -> Tensor:
        """`code` (R, G, 16) int8, `step` and `minimum` (R, G, 1)."""
        ctx.save_for_backward(code)
        return code.float().mul_(step).sub_(minimum)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (code,) = gradients, ctx.saved_tensors
        return None, (gradient * code).sum(-1, keepdim=True), -gradient.sum(-1, keepdim=True)


class Grid(nn.Module):
    """The parametrization of a module's weight. The gains of d and dmin, (R, C/256), are what is trained."""

    def __init__(self, quantized: KQuant, columns: int, transposed: bool) -> None:
        """Of the matrix (R, C) the first `columns` are used; a bench's narrower one fills its last block with zeros."""
        super().__init__()
        self.base, self.columns, self.transposed = quantized, columns, transposed
        code = quantized.codes.to(torch.int8) - KTYPES[quantized.type].zero_code
        self.register_buffer("code", code.reshape(len(code), -1, GROUP), persistent=False)
        self.gain = nn.Parameter(torch.zeros_like(quantized.d, dtype=torch.float32))
        self.min_gain = nn.Parameter(torch.zeros_like(self.gain))

    def blocks(self) -> tuple[Tensor, Tensor]:
        """d and dmin as trained, rounded as the file rounds them, (R, C/256). Where zero is on the grid, it stays."""
        stored = torch.zeros_like(self.base.d) if self.base.dmin is None else self.base.dmin
        d, dmin = self.base.d.float(), stored.float()
        trained = as_half(d * (1 + self.gain))
        return trained, torch.where(dmin == ZERO_RATIO * d, ZERO_RATIO * trained, as_half(dmin * (1 + self.min_gain)))

    def forward(self, original: Tensor) -> Tensor:
        d, dmin = self.blocks()
        mins = torch.zeros_like(self.base.scales) if self.base.mins is None else self.base.mins
        steps = per_group(d, self.base.scales), per_group(dmin, mins)
        weight: Tensor = Scaled.apply(self.code, *steps)  # type: ignore[no-untyped-call]
        weight = weight.flatten(1)[:, : self.columns]
        return weight.T if self.transposed else weight

    @torch.no_grad()
    def quantized(self) -> KQuant:
        """As the file stores it."""
        d, dmin = self.blocks()
        return replace(self.base, d=d.half(), dmin=None if self.base.dmin is None else dmin.half())


def as_half(x: Tensor) -> Tensor:
    """Rounded to float16 forwards, untouched backwards."""
    return x + (half(x) - x).detach()


def put_on_grid(module: nn.Module, quantized: KQuant) -> Grid:
    """Makes `module` compute with `quantized`, its scales trainable."""
    weight = weight_of(module)
    grid = Grid(quantized.to(weight.device), weight.shape[1], isinstance(module, Conv1D))
    parametrize.register_parametrization(module, "weight", grid, unsafe=True)
    return grid


def take_off_grid(module: nn.Module) -> None:
    """The module keeps the quantized values as an ordinary weight."""
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
