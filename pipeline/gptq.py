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
    rows = [
        encode_rows(weight[part].float(), factor, kind, None if kept is None else kept[part], keep_zeros)
        for part in torch.split(torch.arange(len(weight), device=weight.device), ROWS)
    ]
    return joined(rows)


def joined(parts: list[KQuant]) -> KQuant:
    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    first = parts[0]
    return KQuant(
        first.type,
        cat("codes"),
        cat("scales"),
        None if first.mins is None else cat("mins"),
        cat("d"),
        None if first.dmin is None else cat("dmin"),
    )


def encode_rows(weight: Tensor, factor: Tensor, kind: str, kept: Tensor | None, keep_zeros: bool) -> KQuant:
    rows, columns = weight.shape
    affine = KTYPES[kind].max_min > 0
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // GROUP, dtype=torch.int16, device=weight.device)
    mins = torch.empty_like(scales)
    d = torch.empty(rows, columns // BLOCK, dtype=torch.float16, device=weight.device)
    dmin = torch.empty_like(d)
    weight = weight.clone()
    zero = keep_zeros and affine
    for number, (start, end) in enumerate(blocks(columns)):
        now, own = weight[:, start:end], factor[start:end, start:end]
        cost = (1 / own.diagonal() ** 2).reshape(GROUPS, GROUP)
        mask = None if kept is None else kept[:, start:end]
        block = super_of(now.reshape(rows, GROUPS, GROUP), cost, kind, zero)
        d[:, number], dmin[:, number] = block.d, block.dmin
        errors = torch.empty_like(now)
        for g in range(GROUPS):
            span = slice(g * GROUP, (g + 1) * GROUP)
            chosen = group_of(now[:, span], cost[g], block, kind, zero, None if mask is None else mask[:, span])
            scales[:, number * GROUPS + g], mins[:, number * GROUPS + g] = chosen.scale, chosen.min
            step, minimum = block.d * chosen.scale, block.dmin * chosen.min
            for i in range(span.start, span.stop):
                forced = ~mask[:, i] if mask is not None and keep_zeros else None
                code, value = round_column(now[:, i], step, minimum, chosen, kind, forced)
                codes[:, start + i] = code
                errors[:, i] = (now[:, i] - value) / own[i, i]
                now[:, i + 1 :] -= errors[:, i, None] * own[i, None, i + 1 :]
                if mask is not None:
                    now[:, i + 1 :] *= mask[:, i + 1 :]
        weight[:, end:] -= errors @ factor[start:end, end:]
        if kept is not None:
            weight[:, end:] *= kept[:, end:]
    return KQuant(kind, codes, scales, mins if affine else None, d, dmin if affine else None)


def blocks(columns: int) -> Iterator[tuple[int, int]]:
    return ((start, start + BLOCK) for start in range(0, columns, BLOCK))


def super_of(x: Tensor, cost: Tensor, kind: str, zero: bool) -> fit.Super:
    if zero:
        return fit.zero_super(x, cost)
    return fit.affine_super(x, cost) if KTYPES[kind].max_min else fit.symmetric_super(x, cost, kind)


def group_of(x: Tensor, cost: Tensor, block: fit.Super, kind: str, zero: bool, mask: Tensor | None) -> fit.Group:
    if zero:
        return fit.zero_group(x, cost, block, mask)
    return fit.affine_group(x, cost, block) if KTYPES[kind].max_min else fit.symmetric_group(x, cost, block, kind)


def round_column(
    x: Tensor, step: Tensor, minimum: Tensor, chosen: fit.Group, kind: str, forced: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and the values that they decode to, each (R,). Where `forced`, the code that decodes to zero."""
    ktype = KTYPES[kind]
    code = (fit.over(x + minimum, step).round() + ktype.zero_code).clamp(0, ktype.max_code)
    if forced is not None:
        at_zero = fit.over(chosen.min, chosen.scale) if ktype.max_min else torch.full_like(code, ktype.zero_code)
        code = torch.where(forced, at_zero, code)
    return code, step * (code - ktype.zero_code) - minimum
