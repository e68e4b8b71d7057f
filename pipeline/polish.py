"""A quantized matrix made better on its own grid, all weights against all, where GPTQ only ever looks to the right.

In turn, d and dmin of every block by least squares, and every code by coordinate descent (as CDQuant,
arXiv:2406.17542, without its greedy order): each code to the one with the least output error while the others stand.
Neither can raise the error, but for rounding d to float16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.kquant_fit import half, over
from pipeline.kquants import BLOCK, GROUP, KTYPES, KQuant, per_group

ROUNDS = 3  # measured on SmolLM2: the output error falls by 9 to 25%, of which the first round has three quarters
STRIP = 64  # columns whose codes are chosen before the other columns' errors are brought up to date
ROWS = 1024  # polished at once: bounds memory, changes no result
RIDGE = 1e-6  # of the mean diagonal: blocks without a weight leave their d undetermined


def polish(quantized: KQuant, weight: Tensor, hessian: Tensor, frozen: Tensor | None = None) -> KQuant:
    """`quantized` with a smaller tr((Q - W) H (Q - W)ᵀ); `weight` (R, C), `hessian` (C, C) damped.

    Codes that are `frozen` (R, C) stay; so do all stored scales and minima.
    """
    parts = []
    for rows in torch.split(torch.arange(len(weight), device=weight.device), ROWS):
        part = quantized.rows(rows)
        for _ in range(ROUNDS):
            if frozen is None or not KTYPES[part.type].max_min:  # else d and dmin are tied, so that zero is on the grid
                part = refit_blocks(part, weight[rows], hessian)
            part = descend(part, weight[rows], hessian, None if frozen is None else frozen[rows])
        parts.append(part)
    return KQuant.joined(parts)


def refit_blocks(quantized: KQuant, weight: Tensor, hessian: Tensor) -> KQuant:
    """d and dmin of all blocks of a row at once, least squares for its codes, scales and minima."""
    rows, columns = weight.shape
    blocks = columns // BLOCK
    ktype = KTYPES[quantized.type]
    up = (quantized.codes.float() - ktype.zero_code) * quantized.scales.float().repeat_interleave(GROUP, 1)
    shapes = [up] if quantized.mins is None else [up, -quantized.mins.float().repeat_interleave(GROUP, 1)]
    now = quantized.d.float() if quantized.dmin is None else torch.cat([quantized.d, quantized.dmin], 1).float()
    spans = [slice(start, start + BLOCK) for start in range(0, columns, BLOCK)]
    # (R, C) for each unknown: H times what of the weight is multiplied by it
    images = [shape[:, span] @ hessian[span] for shape in shapes for span in spans]
    sums = [[(image * shape).reshape(rows, blocks, BLOCK).sum(-1) for shape in shapes] for image in images]
    normal = torch.stack([torch.cat(row, 1) for row in sums], 1).double()  # (R, N, N), N unknowns
    target = torch.stack([(image * weight).sum(1) for image in images], 1)[..., None].double()
    wrong = target - normal @ now.double()[..., None]
    ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    normal += torch.eye(normal.shape[1], device=weight.device, dtype=normal.dtype) * ridge[:, None, None]
    found = now + torch.linalg.solve(normal, wrong)[..., 0].float()
    if quantized.dmin is None:
        return replace(quantized, d=half(found).half())
    found = half(found.clamp(min=0)).half()
    return replace(quantized, d=found[:, :blocks], dmin=found[:, blocks:])


def descend(quantized: KQuant, weight: Tensor, hessian: Tensor, frozen: Tensor | None) -> KQuant:
    """Every code that is not frozen, column by column, to the best one while the others stand."""
    ktype = KTYPES[quantized.type]
    step, minimum = (values.expand(-1, -1, GROUP).flatten(1) for values in grid_of(quantized))
    inverse = over(torch.ones_like(step), step)
    code = quantized.codes.float()
    value = step * (code - ktype.zero_code) - minimum
    slope = (value - weight) @ hessian  # (R, C), half the gradient of the error
    curve = hessian.diagonal()
    for start in range(0, weight.shape[1], STRIP):
        strip = slice(start, start + STRIP)
        before, within, own = value[:, strip].clone(), slope[:, strip].clone(), hessian[strip, strip]
        for i, column in enumerate(range(start, min(start + STRIP, weight.shape[1]))):
            wanted = value[:, column] - within[:, i] / curve[column] + minimum[:, column]
            best = (wanted * inverse[:, column]).round_().add_(ktype.zero_code).clamp_(0, ktype.max_code)
            if frozen is not None:
                best = torch.where(frozen[:, column], code[:, column], best)
            moved = step[:, column] * (best - code[:, column])
            within += moved[:, None] * own[i]
            value[:, column] += moved
            code[:, column] = best
        slope += (value[:, strip] - before) @ hessian[strip]
    return replace(quantized, codes=code.to(torch.uint8))


def grid_of(quantized: KQuant) -> tuple[Tensor, Tensor]:
    """Step and minimum of each group, (R, C/16, 1)."""
    step = per_group(quantized.d, quantized.scales)
    if quantized.mins is None or quantized.dmin is None:
        return step, torch.zeros_like(step)
    return step, per_group(quantized.dmin, quantized.mins)
