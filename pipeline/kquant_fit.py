"""Scales and minima of k-quants: searches for those with the least weighted squared error.

`x` are weights of shape (..., 16), one group of 16 that share a scale; `h` (16) or broadcastable says how much an
error in each column costs. llama.cpp's own search (make_qkx3_quants, make_qx_quants in ggml-quants.c) fits each
group by itself and rounds its scale afterwards; here the choice is made among the scales that the file can hold.
"""

from __future__ import annotations

from functools import reduce
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kquants import KTYPES

SPANS = torch.linspace(0.45, 1.15, 8)  # of a group's range, tried as the range of the codes
FINE_SPANS = torch.linspace(0.94, 1.03, 4)  # the same for a type with so many codes that none is worth cutting off
MANY_CODES = 32
ROUNDS = 2  # of choosing codes for a scale and a scale for codes
GROUP_REACH = (2, 3)  # stored scales and minima tried on either side of the best real ones
SUPER = (1.0, 0.88, 0.76)  # of the largest group's scale, tried as that of the whole block
SUPER_MIN = (1.0, 0.8)  # the same of the minima
REFINEMENTS = 3  # of the block's d and dmin for the codes found, and of the codes for them
LEAST = 1e-30  # far below what a float16 can hold


class Super(NamedTuple):
    """Of one block of 256: what its 16 groups' scales and minima are multiples of."""

    d: Tensor  # (R,) float32 that a float16 holds exactly
    dmin: Tensor  # (R,); zero where the type has no minima


class Group(NamedTuple):
    """Of one group of 16, as the file stores them."""

    scale: Tensor  # (R,) float32, whole numbers
    min: Tensor  # (R,)


def half(x: Tensor) -> Tensor:
    """Rounded to what float16 holds, and never beyond it."""
    return x.clamp(-65504, 65504).half().float()


def over(x: Tensor, divisor: Tensor) -> Tensor:
    """x / divisor, and 0 where that is 0, or so small that its reciprocal is not finite.

    The divisor is the smaller tensor, so it is the one that is looked at.
    """
    return x * torch.where(divisor.abs() < LEAST, 0.0, 1 / divisor)


# Q2_K: w = d·scale·code − dmin·min


def fit_affine(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Best real scale and minimum, each ≥ 0 and of shape (...), for codes 0 to 3."""
    top = KTYPES["Q2_K"].max_code
    low = x.amin(-1).clamp(max=0)
    span = (x.amax(-1) - low).clamp(min=1e-12)
    scale = span[..., None] * SPANS.to(x.device) / top  # (..., S)
    minimum = -low[..., None].expand_as(scale)
    x, h = x[..., None, :], h[..., None, :]
    for _ in range(ROUNDS):
        code = ((x + minimum[..., None]) / scale[..., None]).round_().clamp_(0, top)  # (..., S, 16)
        scale, minimum = least_squares(x, h, code, scale, minimum)
    code = ((x + minimum[..., None]) / scale[..., None]).round_().clamp_(0, top)
    error = (h * (scale[..., None] * code - minimum[..., None] - x) ** 2).sum(-1)
    best = error.argmin(-1, keepdim=True)
    return scale.gather(-1, best)[..., 0], minimum.gather(-1, best)[..., 0]


def least_squares(x: Tensor, h: Tensor, code: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum with the least error for these codes; as they were where that has no answer."""
    n, sc, scc = h.sum(-1), (h * code).sum(-1), (h * code * code).sum(-1)
    sx, scx = (h * x).sum(-1), (h * code * x).sum(-1)
    determinant = n * scc - sc * sc
    slope = over(n * scx - sc * sx, determinant)
    offset = over(scc * sx - sc * scx, determinant)  # −minimum
    definite = determinant > 1e-9 * n * scc  # not so where all codes are the same
    alone = torch.where(definite, offset > 0, minimum == 0)  # a minimum below zero cannot be stored
    slope = torch.where(alone, over(scx, scc), slope)
    usable = (slope > 0) & (definite | alone)
    return torch.where(usable, slope, scale), torch.where(usable & ~alone, -offset, torch.where(alone, 0.0, minimum))


class Choice(NamedTuple):
    """For each group, the stored scale and minimum with the least error."""

    scale: Tensor  # (...,)
    min: Tensor  # (...,)
    error: Tensor  # (...,)


def affine_choice(x: Tensor, h: Tensor, block: Super, real: tuple[Tensor, Tensor], reach: tuple[int, int]) -> Choice:
    """Among those within `reach` of the `real` ones, (...) each; `x` (..., 16), d and dmin (..., 1)."""
    ktype = KTYPES["Q2_K"]
    d, dmin = block
    scales = nearby(over(real[0], d), reach[0], 0, ktype.max_scale)  # (..., S)
    minima = nearby(over(real[1], dmin), reach[1], 0, ktype.max_min)  # (..., M)
    pairs = (*scales.shape, minima.shape[-1])
    scales = scales[..., :, None].expand(pairs).flatten(-2)  # (..., P)
    minima = minima[..., None, :].expand(pairs).flatten(-2)
    step, minimum = (d[..., None] * scales)[..., None], (dmin[..., None] * minima)[..., None]
    x = x[..., None, :] + minimum
    code = over(x, step).round_().clamp_(0, ktype.max_code)
    error = (code.mul_(step).sub_(x).square_() * h[..., None, :]).sum(-1)
    best = error.argmin(-1, keepdim=True)
    return Choice(*(values.gather(-1, best)[..., 0] for values in (scales, minima, error)))


def affine_super(x: Tensor, h: Tensor) -> Super:
    """For a block, `x` (R, 16, 16) and `h` (16, 16)."""
    ktype = KTYPES["Q2_K"]
    real = fit_affine(x, h)  # (R, 16) each

    def tried(block: Super) -> tuple[Super, Choice, Tensor]:
        found = affine_choice(x, h, Super(block.d[:, None], block.dmin[:, None]), real, (1, 1))
        return block, found, found.error.sum(-1)

    starts = [
        Super(half(real[0].amax(-1) * high / ktype.max_scale), half(real[1].amax(-1) * low / ktype.max_min))
        for high, low in product(SUPER, SUPER_MIN)
    ]
    best = reduce(better_of, map(tried, starts))
    for _ in range(REFINEMENTS):
        best = better_of(best, tried(refined(x, h, *best[:2])))
    return best[0]


Tried = tuple[Super, Choice, Tensor]  # the last is the error of the whole block, (R,)


def better_of(a: Tried, b: Tried) -> Tried:
    """Row by row the one with the smaller error."""
    take = b[2] < a[2]

    def chosen(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(take.view(-1, *[1] * (one.ndim - 1)), other, one)

    return Super(*map(chosen, a[0], b[0])), Choice(*map(chosen, a[1], b[1])), chosen(a[2], b[2])


def refined(x: Tensor, h: Tensor, block: Super, found: Choice) -> Super:
    """d and dmin with the least error for the codes that `block` and `found` give."""
    d, dmin = block.d[:, None, None], block.dmin[:, None, None]
    scale, minimum = found.scale[..., None], found.min[..., None]  # (R, 16, 1)
    code = over(x + dmin * minimum, d * scale).round_().clamp_(0, KTYPES["Q2_K"].max_code)
    up = (scale * code).flatten(1)  # the weight is d · up − dmin · down
    down = minimum.expand_as(x).flatten(1)
    x, h = x.flatten(1), h.flatten()
    uu, ud, dd = (h * up * up).sum(-1), (h * up * down).sum(-1), (h * down * down).sum(-1)
    ux, dx = (h * up * x).sum(-1), (h * down * x).sum(-1)
    determinant = uu * dd - ud * ud
    usable = determinant > 1e-9 * uu * dd
    better_d = torch.where(usable, over(dd * ux - ud * dx, determinant), block.d)
    better_dmin = torch.where(usable, over(ud * ux - uu * dx, determinant), block.dmin)
    return Super(half(better_d.clamp(min=0)), half(better_dmin.clamp(min=0)))


def nearby(x: Tensor, reach: int, low: int, high: int) -> Tensor:
    """The whole numbers within `reach` of x, between `low` and `high`: (..., 2 * reach + 1)."""
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    return (x.round()[..., None] + offsets).clamp_(low, high)


def affine_group(x: Tensor, h: Tensor, block: Super) -> Group:
    """The stored scale and minimum for one group, `x` (R, 16), `h` (16)."""
    found = affine_choice(x, h, block, fit_affine(x, h), GROUP_REACH)
    return Group(found.scale, found.min)


# Q2_K with zero on its grid: dmin = 2·d and 2·min = k·scale, so that code k is exactly zero. With dmin = d no group
# could reach as far below zero as above it, and the errors are 1.4 times as large.

ZERO_RATIO = 2  # of dmin to d


def zero_super(x: Tensor, h: Tensor) -> Super:
    ktype = KTYPES["Q2_K"]
    d = half(x.abs().amax((-1, -2)) / 2 / ktype.max_scale)  # of a group with two codes below zero
    return Super(d, ZERO_RATIO * d)


def zero_group(x: Tensor, h: Tensor, block: Super, kept: Tensor) -> Group:
    """As `affine_group`, among the pairs that have zero on the grid. Weights that are not `kept` are zero in it."""
    ktype = KTYPES["Q2_K"]
    pairs = [
        (s, k * s // ZERO_RATIO)
        for k in range(ktype.max_code + 1)
        for s in range(ktype.max_scale + 1)
        if k * s % ZERO_RATIO == 0 and k * s <= ZERO_RATIO * ktype.max_min
    ]
    scales, minima = torch.tensor(pairs, dtype=torch.float32, device=x.device).T  # (P,)
    step, minimum = block.d[:, None] * scales, block.dmin[:, None] * minima  # (R, P)
    code = over(x[:, None] + minimum[..., None], step[..., None]).round_().clamp_(0, ktype.max_code)
    errors = h * (code * step[..., None] - minimum[..., None] - x[:, None]) ** 2  # (R, P, 16)
    error = (errors * kept[:, None]).sum(-1)
    best = error.argmin(-1)
    return Group(scales[best], minima[best])


# Q3_K and Q6_K: w = d·scale·(code − zero), symmetric but for one code more below zero


def fit_symmetric(x: Tensor, h: Tensor, kind: str) -> Tensor:
    """Best real scale (...), of either sign."""
    ktype = KTYPES[kind]
    low, high = -ktype.zero_code, ktype.max_code - ktype.zero_code
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).clamp(-1e30, 1e30)  # (..., 1)
    spans = FINE_SPANS if ktype.max_code >= MANY_CODES else torch.cat([SPANS, -SPANS])
    scale = extreme * spans.to(x.device) / low  # (..., S)
    x, h = x[..., None, :], h[..., None, :]
    for _ in range(ROUNDS):
        code = over(x, scale[..., None]).round_().clamp_(low, high)
        refined = over((h * code * x).sum(-1), (h * code * code).sum(-1))
        scale = torch.where(refined == 0, scale, refined)
    code = over(x, scale[..., None]).round_().clamp_(low, high)
    error = (h * (scale[..., None] * code - x) ** 2).sum(-1)
    return scale.gather(-1, error.argmin(-1, keepdim=True))[..., 0]


def symmetric_super(x: Tensor, h: Tensor, kind: str) -> Super:
    """For a block, `x` (R, 16, 16) and `h` (16, 16)."""
    scale = fit_symmetric(x, h, kind)  # (R, 16)
    largest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))[:, 0]
    d = half(largest / KTYPES[kind].min_scale)  # the negative end reaches one further
    return Super(d, torch.zeros_like(d))


def symmetric_group(x: Tensor, h: Tensor, block: Super, kind: str) -> Group:
    """The best of the stored scales near the best real one, for one group, `x` (R, 16), `h` (16)."""
    ktype = KTYPES[kind]
    real = fit_symmetric(x, h, kind)
    scales = nearby(over(real, block.d), 3, ktype.min_scale, ktype.max_scale)  # (R, S)
    step = (block.d[:, None] * scales)[..., None]
    code = over(x[:, None], step).round_().clamp_(-ktype.zero_code, ktype.max_code - ktype.zero_code)
    error = (h * (code * step - x[:, None]) ** 2).sum(-1)
    best = error.argmin(-1, keepdim=True)
    scale = scales.gather(-1, best)[:, 0]
    return Group(scale, torch.zeros_like(scale))
