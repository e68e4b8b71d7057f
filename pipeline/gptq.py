"""Our encoder for k-quants: GPTQ (arXiv:2210.17323) on the grid that the file has.

Column by column, the error of rounding a weight is spread over the columns to its right, as SparseGPT does with the
error of dropping one. Scales are chosen group by group from the weights as they are by then, weighted by what an
error costs after the rest has made up for it: 1 / U_ii², U the Cholesky factor of the inverse Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline import kquant_fit as fit
from pipeline.errors import CheckFailed
from pipeline.kquants import BLOCK, GROUP, GROUPS, KTYPES, KQuant
from pipeline.rows import in_parts

ROWS = 4096  # encoded at once: bounds memory to about 1 GB, changes no result


def encode(
    weight: Tensor, factor: Tensor, kind: str, *, kept: Tensor | None = None, keep_zeros: bool = False
) -> KQuant:
    """`weight` (R, C) float32, C a multiple of 256, in the type `kind`.

    `factor` (C, C) is `hessian.inverse_factor` of its inputs; the identity rounds each weight by itself. Weights
    that are not `kept` (R, C) were pruned: no error is spread to them. `keep_zeros` makes them exactly zero, at the
    cost of a coarser grid where the type has minima. Raises `CheckFailed` for a weight that is not finite.
    """
    if not torch.isfinite(weight).all():
        raise CheckFailed("a matrix to be quantized has weights that are not finite; train the model again")

    def part(rows: Tensor) -> KQuant:
        return encode_rows(weight[rows].float(), factor, kind, None if kept is None else kept[rows], keep_zeros)

    return KQuant.joined(in_parts(part, len(weight), ROWS, weight.device))


def encode_rows(weight: Tensor, factor: Tensor, kind: str, kept: Tensor | None, keep_zeros: bool) -> KQuant:
    rows, columns = weight.shape
    affine = KTYPES[kind].max_min > 0
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // GROUP, dtype=torch.int16, device=weight.device)
    mins = torch.empty_like(scales)
    d = torch.empty(rows, columns // BLOCK, dtype=torch.float16, device=weight.device)
    dmin = torch.empty_like(d)
    weight = weight.clone()
    mask = torch.ones_like(weight) if kept is None else kept.to(weight.dtype)
    for number, (start, end) in enumerate(blocks(columns)):
        now, own, stays = weight[:, start:end], factor[start:end, start:end], mask[:, start:end]
        cost = (1 / own.diagonal() ** 2).reshape(GROUPS, GROUP)
        block = super_of((now * stays).reshape(rows, GROUPS, GROUP), cost, kind, keep_zeros and affine)
        d[:, number], dmin[:, number] = block.d, block.dmin
        errors = torch.empty_like(now)
        for g in range(GROUPS):
            span = slice(g * GROUP, (g + 1) * GROUP)
            group, within = now[:, span] * stays[:, span], own[span, span]
            chosen = group_of(group, cost[g], block, kind, keep_zeros and affine, stays[:, span])
            scales[:, number * GROUPS + g], mins[:, number * GROUPS + g] = chosen.scale, chosen.min
            code, errors[:, span] = round_group(group, stays[:, span], within, block, chosen, kind, keep_zeros)
            codes[:, start + span.start : start + span.stop] = code
            now[:, span.stop :] -= errors[:, span] @ own[span, span.stop :]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return KQuant(kind, codes, scales, mins if affine else None, d, dmin if affine else None)


def round_group(
    x: Tensor, stays: Tensor, factor: Tensor, block: fit.Super, chosen: fit.Group, kind: str, keep_zeros: bool
) -> tuple[Tensor, Tensor]:
    """Codes of one group, and the errors to spread, each (R, 16). What is spread to a pruned weight is dropped."""
    ktype = KTYPES[kind]
    step, minimum = block.d * chosen.scale, block.dmin * chosen.min
    inverse = fit.over(torch.ones_like(step), step)
    codes, errors = torch.empty_like(x), torch.empty_like(x)
    at_zero = (minimum * inverse).round() + ktype.zero_code
    for i in range(GROUP):
        target = x[:, i] * stays[:, i]
        code = ((target + minimum) * inverse).round_().add_(ktype.zero_code).clamp_(0, ktype.max_code)
        if keep_zeros:
            code = torch.where(stays[:, i] == 0, at_zero, code)
        codes[:, i] = code
        errors[:, i] = (target - (step * (code - ktype.zero_code) - minimum)) / factor[i, i]
        x[:, i + 1 :] -= errors[:, i, None] * factor[i, None, i + 1 :]
    return codes, errors


def blocks(columns: int) -> Iterator[tuple[int, int]]:
    return ((start, start + BLOCK) for start in range(0, columns, BLOCK))


def super_of(x: Tensor, cost: Tensor, kind: str, zero: bool) -> fit.Super:
    if zero:
        return fit.zero_super(x, cost)
    return fit.affine_super(x, cost) if KTYPES[kind].max_min else fit.symmetric_super(x, cost, kind)


def group_of(x: Tensor, cost: Tensor, block: fit.Super, kind: str, zero: bool, stays: Tensor) -> fit.Group:
    if zero:
        return fit.zero_group(x, cost, block, stays)
    return fit.affine_group(x, cost, block) if KTYPES[kind].max_min else fit.symmetric_group(x, cost, block, kind)
