"""A quantized matrix made better on its own grid, all weights against all, where GPTQ only ever looks to the right.

In turn, while all others stand: d and dmin of every block by least squares; the scale, the minimum and the codes of
every group at once, by Babai's nearest plane for each scale and minimum near the present ones; every code by itself, by
coordinate descent (as CDQuant, arXiv:2406.17542, without its greedy order). Nothing is taken that raises the error, but
for rounding d to float16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.kquant_fit import half, over
from pipeline.kquants import BLOCK, GROUP, KTYPES, KQuant
from pipeline.rows import in_parts

# Measured on SmolLM2: the output error falls by 35% in Q3_K and 9% in Q2_K; a fourth round gains about a percent.
ROUNDS = 3
# Stored scales and minima tried on either side of a group's own; 2 take half as long again and gain half a percent.
REACH = 1
STRIP = 64  # columns whose codes are chosen before the other columns' errors are brought up to date
ROWS = 1024  # polished at once: bounds memory, changes no result
# A GPU starts these small steps one by one, so fewer and larger ones leave it idle less: 4,096 rows of 3,072 columns,
# and more of narrower ones. Not timed on one yet.
WEIGHTS_ON_GPU = 4096 * 3072
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
                found = regroup(found, weight[rows], hessian, own)
            found = descend(found, weight[rows], hessian, own)
        return found

    at_most = ROWS if weight.device.type == "cpu" else max(ROWS, WEIGHTS_ON_GPU // weight.shape[1])
    return KQuant.joined(in_parts(part, len(weight), at_most, weight.device))


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


def regroup(quantized: KQuant, weight: Tensor, hessian: Tensor, frozen: Tensor | None) -> KQuant:
    """Every group's scale, minimum and codes that are not frozen, to the best that is tried while the others stand."""
    grid = WholeNumbers(quantized)
    value = quantized.dequantize()
    slope = (value - weight) @ hessian  # (R, C), half the gradient of the error
    inverses, factors = inverses_of(hessian)
    for g in range(weight.shape[1] // GROUP):
        span = slice(g * GROUP, (g + 1) * GROUP)
        own, stays = hessian[span, span], None if frozen is None else frozen[:, span]
        target = value[:, span] - slope[:, span] @ inverses[g]  # the best of all real numbers
        if stays is not None:
            target = target.masked_fill(stays, 0.0)
        scales, mins = grid.near(g)
        codes = grid.nearest_plane(target, g, scales, mins, factors[g], stays)
        change = grid.values(g, scales, mins, codes) - value[:, None, span]  # (R, P, 16)
        error = ((change @ own + 2 * slope[:, None, span]) * change).sum(-1)
        best = error.argmin(1)
        taken = error.gather(1, best[:, None])[:, 0] < 0
        rows = torch.arange(len(best), device=best.device)[taken]
        grid.scales[rows, g], grid.mins[rows, g] = scales[rows, best[rows]], mins[rows, best[rows]]
        grid.codes[rows, span] = codes[rows, best[rows]]
        moved = torch.zeros_like(target)
        moved[rows] = change[rows, best[rows]]
        value[:, span] += moved
        slope += moved @ hessian[span]
    return grid.quantized()


def inverses_of(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """For each group the inverse of its own part of `hessian` and the upper Cholesky factor of that, (G, 16, 16) each.

    All at once: one by one, a GPU would wait for each to know whether it was singular.
    """
    groups = len(hessian) // GROUP
    own = hessian.reshape(groups, GROUP, groups, GROUP).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    inverses = torch.linalg.inv(own.double())
    return inverses.float(), torch.linalg.cholesky(inverses, upper=True).float()


def descend(quantized: KQuant, weight: Tensor, hessian: Tensor, frozen: Tensor | None) -> KQuant:
    """Every code that is not frozen, column by column, to the best one while the others stand."""
    grid = WholeNumbers(quantized)
    step, minimum = (values.repeat_interleave(GROUP, 1) for values in grid.steps())
    inverse, curve = over(torch.ones_like(step), step), hessian.diagonal()
    value = quantized.dequantize()
    slope = (value - weight) @ hessian
    for start in range(0, weight.shape[1], STRIP):
        strip = slice(start, start + STRIP)
        before, near, own = value[:, strip].clone(), slope[:, strip].clone(), hessian[strip, strip]
        for i, column in enumerate(range(start, min(start + STRIP, weight.shape[1]))):
            code = grid.codes[:, column]
            wanted = value[:, column] - near[:, i] / curve[column] + minimum[:, column]
            best = (wanted * inverse[:, column]).round_().clamp_(grid.low, grid.high)
            if frozen is not None:
                best = torch.where(frozen[:, column], code, best)
            moved = step[:, column] * (best - code)
            near += moved[:, None] * own[i]
            value[:, column] += moved
            code.copy_(best)
        slope += (value[:, strip] - before) @ hessian[strip]
    return grid.quantized()


class WholeNumbers:
    """The whole numbers of a k-quant as float32, to be changed, and what they stand for."""

    def __init__(self, quantized: KQuant) -> None:
        self.base, ktype = quantized, KTYPES[quantized.type]
        self.low, self.high = -ktype.zero_code, ktype.max_code - ktype.zero_code
        self.ktype = ktype
        self.codes = quantized.codes.float() - ktype.zero_code  # (R, C)
        self.scales = quantized.scales.float()  # (R, C/16)
        self.mins = torch.zeros_like(self.scales) if quantized.mins is None else quantized.mins.float()
        self.d = quantized.d.float().repeat_interleave(BLOCK // GROUP, 1)  # (R, C/16)
        dmin = torch.zeros_like(quantized.d) if quantized.dmin is None else quantized.dmin
        self.dmin = dmin.float().repeat_interleave(BLOCK // GROUP, 1)

    def steps(self) -> tuple[Tensor, Tensor]:
        """Step and minimum of each group, (R, C/16)."""
        return self.d * self.scales, self.dmin * self.mins

    def near(self, g: int) -> tuple[Tensor, Tensor]:
        """Pairs of a scale and a minimum near those of group `g`, (R, P) each."""
        offsets = torch.arange(-REACH, REACH + 1, device=self.d.device)
        scales = (self.scales[:, g, None] + offsets).clamp_(self.ktype.min_scale, self.ktype.max_scale)
        if not self.ktype.max_min:
            return scales, torch.zeros_like(scales)
        mins = (self.mins[:, g, None] + offsets).clamp_(0, self.ktype.max_min)
        pairs = (len(scales), len(offsets), len(offsets))
        return scales[:, :, None].expand(pairs).flatten(1), mins[:, None, :].expand(pairs).flatten(1)

    def values(self, g: int, scales: Tensor, mins: Tensor, codes: Tensor) -> Tensor:
        """(R, P, 16) of group `g` with other scales and minima (R, P)."""
        return (self.d[:, g, None] * scales)[..., None] * codes - (self.dmin[:, g, None] * mins)[..., None]

    def nearest_plane(
        self, target: Tensor, g: int, scales: Tensor, mins: Tensor, factor: Tensor, stays: Tensor | None
    ) -> Tensor:
        """Codes (R, P, 16) near `target` (R, 16): one after the other, each rounding's error spread to those that
        follow. `factor` (16, 16) is upper triangular, UᵀU the inverse of the group's own Hessian."""
        step, minimum = self.d[:, g, None] * scales, self.dmin[:, g, None] * mins
        inverse = over(torch.ones_like(step), step)
        wanted = target[:, None].expand(*step.shape, GROUP).clone()
        codes = torch.empty_like(wanted)
        for i in range(GROUP):
            code = ((wanted[..., i] + minimum) * inverse).round_().clamp_(self.low, self.high)
            if stays is not None:
                code = torch.where(stays[:, i, None], self.codes[:, g * GROUP + i, None], code)
            codes[..., i] = code
            error = (wanted[..., i] - (step * code - minimum)) / factor[i, i]
            wanted[..., i + 1 :] -= error[..., None] * factor[i, i + 1 :]
        return codes

    def quantized(self) -> KQuant:
        codes, scales = (self.codes + self.ktype.zero_code).to(torch.uint8), self.scales.to(torch.int16)
        mins = None if self.base.mins is None else self.mins.to(torch.int16)
        return replace(self.base, codes=codes, scales=scales, mins=mins)
