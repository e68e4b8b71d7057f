"""A matrix that can be trained without leaving its k-quant's grid: quantization-aware training by the
straight-through estimator (Bengio et al., arXiv:1308.3432) on the very codes and scales that the file holds.

Trained are where each weight lies between the codes, in units of the grid, and the block's d and dmin; the stored
scales and minima of the groups stay as they were chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from pipeline.kquant_fit import ZERO_RATIO, half, over
from pipeline.kquants import BLOCK, GROUP, KTYPES, KQuant, per_group

# How far from its code a weight may start, of the 0.5 at which it is another code's. Small, so that it takes many steps
# of one mind to change a code: from 0.45 codes flip by the noise of a few batches, and those first that the encoder had
# rounded the other way to make up for others. Measured on SmolLM2, 16 steps: a KL of 0.79 nats a token, without 0.69.
CELL = 0.1


class RoundToGrid(Function):
    """step · round(place) − minimum; backwards, as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, step: Tensor, minimum: Tensor, low: int, high: int, kept: Tensor) -> Tensor:
        """`place` (R, G, 16), `step` and `minimum` (R, G, 1), `kept` (R, G, 16): weights that may change code."""
        code = place.round().clamp_(low, high)
        ctx.save_for_backward(code.to(torch.int8), step, ((place - code).abs_() <= 0.5).logical_and_(kept))
        return code.mul_(step).sub_(minimum)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        code, step, moving = ctx.saved_tensors
        to_minimum = -gradient.sum(-1, keepdim=True)
        to_step = (gradient * code).sum(-1, keepdim=True)
        return gradient.mul(step).mul_(moving), to_step, to_minimum, None, None, None


class Grid(nn.Module):
    """The parametrization of a module's weight. `place` and the gains are what is trained."""

    def __init__(self, quantized: KQuant, weight: Tensor, kept: Tensor, transposed: bool) -> None:
        """`weight` (R, C) is what the codes stand for before rounding; `kept` (R, C) are the weights not pruned.

        Columns beyond C, which fill the last block of a bench's narrower matrix, are on no one's mind.
        """
        super().__init__()
        quantized = quantized.to(weight.device)
        self.base, self.transposed, self.columns = quantized, transposed, weight.shape[1]
        ktype = KTYPES[quantized.type]
        self.low, self.high = -ktype.zero_code, ktype.max_code - ktype.zero_code
        code = self.grouped(quantized.codes).float() - ktype.zero_code
        step, minimum = self.steps(quantized.d.float(), self.dmin_of(quantized).float())
        wanted = over(self.grouped(padded(weight, quantized.codes.shape[1])) + minimum, step)
        self.place = nn.Parameter(torch.where(step == 0, code, wanted.clamp(code - CELL, code + CELL)))
        self.gain = nn.Parameter(torch.zeros_like(quantized.d, dtype=torch.float32))
        self.min_gain = nn.Parameter(torch.zeros_like(self.gain))
        self.register_buffer("kept", self.grouped(padded(kept, quantized.codes.shape[1])), persistent=False)

    @staticmethod
    def grouped(values: Tensor) -> Tensor:
        return values.reshape(len(values), -1, GROUP)

    @staticmethod
    def dmin_of(quantized: KQuant) -> Tensor:
        return torch.zeros_like(quantized.d) if quantized.dmin is None else quantized.dmin

    def steps(self, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
        """Step and minimum of each group, (R, C/16, 1), from those of the blocks, (R, C/256)."""
        mins = torch.zeros_like(self.base.scales) if self.base.mins is None else self.base.mins
        return per_group(d, self.base.scales), per_group(dmin, mins)

    def blocks(self) -> tuple[Tensor, Tensor]:
        """d and dmin as trained, rounded as the file rounds them, (R, C/256). Where zero is on the grid, it stays."""
        d, dmin = self.base.d.float(), self.dmin_of(self.base).float()
        trained = as_half(d * (1 + self.gain))
        return trained, torch.where(dmin == ZERO_RATIO * d, ZERO_RATIO * trained, as_half(dmin * (1 + self.min_gain)))

    def forward(self, original: Tensor) -> Tensor:
        weight: Tensor = RoundToGrid.apply(  # type: ignore[no-untyped-call]
            self.place, *self.steps(*self.blocks()), self.low, self.high, self.kept
        )
        weight = weight.flatten(1)[:, : self.columns]
        return weight.T if self.transposed else weight

    @torch.no_grad()
    def quantized(self) -> KQuant:
        """As the file stores it."""
        d, dmin = self.blocks()
        code = self.place.round().clamp(self.low, self.high) - self.low
        stored = None if self.base.dmin is None else dmin.half()
        return replace(self.base, codes=code.flatten(1).to(torch.uint8), d=d.half(), dmin=stored)


def padded(values: Tensor, columns: int) -> Tensor:
    missing = columns - values.shape[1]
    return nn.functional.pad(values, (0, missing)) if missing else values


def whole_blocks(columns: int) -> int:
    return -(-columns // BLOCK) * BLOCK


def as_half(x: Tensor) -> Tensor:
    """Rounded to float16 forwards, untouched backwards."""
    return x + (half(x) - x).detach()


def put_on_grid(module: nn.Module, quantized: KQuant, weight: Tensor, kept: Tensor) -> Grid:
    """Makes `module` compute with `quantized`, trainable; `weight` and `kept` (out, in)."""
    grid = Grid(quantized, weight, kept, isinstance(module, Conv1D))
    parametrize.register_parametrization(module, "weight", grid, unsafe=True)
    return grid


def take_off_grid(module: nn.Module) -> None:
    """The module keeps the quantized values as an ordinary weight."""
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
