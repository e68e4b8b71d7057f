"""A quantized matrix made better on its own grid, all weights against all, where GPTQ only ever looks to the right.

In turn, d and dmin of every block by least squares, and every stored scale, minimum and code by coordinate descent (as
CDQuant, arXiv:2406.17542, without its greedy order): each to the whole number with the least output error while all
others stand. Neither can raise the error, but for rounding d to float16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.kquant_fit import half, over
from pipeline.kquants import BLOCK, GROUP, KTYPES, KQuant
from pipeline.rows import in_parts

# Measured on SmolLM2: the output error falls by 33% in Q3_K and 6% in Q2_K, most of it in the first round.
ROUNDS = 4
STRIP = 64  # columns, a multiple of GROUP, that are chosen before the other columns' errors are brought up to date
ROWS = 1024  # polished at once: bounds memory, changes no result
RIDGE = 1e-6  # of the mean diagonal: blocks without a weight leave their d undetermined


def polish(quantized: KQuant, weight: Tensor, hessian: Tensor, frozen: Tensor | None = None) -> KQuant:
    """`quantized` with a smaller tr((Q - W) H (Q - W)ᵀ); `weight` (R, C), `hessian` (C, C) damped.

    Codes that are `frozen` (R, C) stay. Where that is to keep zeros in a type with minima, so does the grid: its d and
    dmin, scales and minima are tied so that zero is on it.
    """

    def part(rows: Tensor) -> KQuant:
        found, own = quantized.rows(rows), None if frozen is None else frozen[rows]
        for _ in range(ROUNDS):
            if not tied(found, own):
                found = refit_blocks(found, weight[rows], hessian)
            found = descend(found, weight[rows], hessian, own)
        return found

    return KQuant.joined(in_parts(part, len(weight), ROWS, weight.device))


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


def tied(quantized: KQuant, frozen: Tensor | None) -> bool:
    return frozen is not None and KTYPES[quantized.type].max_min > 0


def descend(quantized: KQuant, weight: Tensor, hessian: Tensor, frozen: Tensor | None) -> KQuant:
    """Every group's scale and minimum, then its codes that are not frozen, to the best while all others stand."""
    ktype = KTYPES[quantized.type]
    d, dmin = (as_floats(values, quantized.d) for values in (quantized.d, quantized.dmin))
    scales, mins = (as_floats(values, quantized.scales) for values in (quantized.scales, quantized.mins))
    codes = quantized.codes.float() - ktype.zero_code
    value = quantized.dequantize()
    slope = (value - weight) @ hessian  # (R, C), half the gradient of the error
    for start in range(0, weight.shape[1], STRIP):
        strip = slice(start, start + STRIP)
        before = value[:, strip].clone()
        near = Strip(value[:, strip], slope[:, strip].clone(), hessian[strip, strip])
        for g in range(start // GROUP, min(start + STRIP, weight.shape[1]) // GROUP):
            span, block = slice(g * GROUP - start, (g + 1) * GROUP - start), g * GROUP // BLOCK
            own = codes[:, g * GROUP : (g + 1) * GROUP]
            if not tied(quantized, frozen):
                up = d[:, block, None] * own
                scales[:, g] += near.move(span, up, scales[:, g], ktype.min_scale, ktype.max_scale)
                if ktype.max_min:
                    down = -dmin[:, block, None].expand_as(own)
                    mins[:, g] += near.move(span, down, mins[:, g], 0, ktype.max_min)
            step = d[:, block] * scales[:, g]
            low, high = -ktype.zero_code, ktype.max_code - ktype.zero_code
            for i in range(GROUP):
                column = slice(span.start + i, span.start + i + 1)
                stays = None if frozen is None else frozen[:, g * GROUP + i]
                own[:, i] += near.move(column, step[:, None], own[:, i], low, high, stays)
        slope += (value[:, strip] - before) @ hessian[strip]
    found = replace(quantized, codes=(codes + ktype.zero_code).to(torch.uint8), scales=scales.to(torch.int16))
    return found if quantized.mins is None else replace(found, mins=mins.to(torch.int16))


def as_floats(values: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float32) if values is None else values.float()


@dataclass
class Strip:
    """A few columns of the weights, the slope of the error in them, and their share of the Hessian."""

    value: Tensor  # (R, S), changed in place
    slope: Tensor  # (R, S)
    hessian: Tensor  # (S, S)

    def move(self, span: slice, unit: Tensor, now: Tensor, low: int, high: int, stays: Tensor | None = None) -> Tensor:
        """(R,): by how much the whole numbers `now` (R,), each worth `unit` in the columns of `span`, were changed."""
        image = unit @ self.hessian[span]  # (R, S)
        curve = (image[:, span] * unit).sum(1)
        wanted = now - over((self.slope[:, span] * unit).sum(1), curve)
        change = wanted.round_().clamp_(low, high) - now
        if stays is not None:
            change = change.masked_fill(stays, 0.0)
        self.value[:, span] += change[:, None] * unit
        self.slope += change[:, None] * image
        return change
