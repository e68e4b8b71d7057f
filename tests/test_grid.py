from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.gptq import encode
from pipeline.grid import CELL, Grid, put_on_grid, take_off_grid
from pipeline.kquants import KTYPES, KQuant, pack, unpack
from pipeline.matrices import weight_of

KINDS = sorted(KTYPES)
ROWS, COLUMNS = 6, 512


def half_zero(seed=0, columns=COLUMNS):
    torch.manual_seed(seed)
    return 0.02 * torch.randn(ROWS, columns) * (torch.rand(ROWS, columns) < 0.5)


def grid_of(kind, *, seed=0, keep_zeros=False, transposed=False):
    weight = half_zero(seed)
    k = encode(weight, torch.eye(COLUMNS), kind, kept=weight != 0, keep_zeros=keep_zeros)
    return k, Grid(k, weight, weight != 0, transposed)


def values(grid):
    return grid(torch.zeros(0))


def disturb(grid, seed=1):
    """As training moves them: places by up to a code, scales by a few percent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        grid.place += 0.7 * torch.randn(grid.place.shape, generator=generator) * grid.kept
        grid.gain += 0.03 * torch.randn(grid.gain.shape, generator=generator)
        grid.min_gain += 0.03 * torch.randn(grid.gain.shape, generator=generator)


def slow_value(grid):
    """The same weight by torch's own operations, differentiable but for the rounding, which passes gradients on."""

    def rounded(x, to):
        return x + (to - x).detach()

    k = grid.base
    d, dmin = k.d.float(), torch.zeros_like(k.d).float() if k.dmin is None else k.dmin.float()
    d = rounded(d * (1 + grid.gain), (d * (1 + grid.gain)).half().float())
    dmin = rounded(dmin * (1 + grid.min_gain), (dmin * (1 + grid.min_gain)).half().float())
    mins = torch.zeros_like(k.scales) if k.mins is None else k.mins
    step = d.repeat_interleave(16, 1) * k.scales  # (R, C/16)
    minimum = dmin.repeat_interleave(16, 1) * mins
    code = grid.place.detach().round().clamp(grid.low, grid.high)
    moving = grid.kept & ((grid.place.detach() - code).abs() <= 0.5)
    place = torch.where(moving, grid.place, grid.place.detach())
    weight = step[..., None] * rounded(place, code) - minimum[..., None]
    return weight.flatten(1)


@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_grid_is_the_quantized_matrix_bit_for_bit(kind, keep_zeros):
    k, grid = grid_of(kind, keep_zeros=keep_zeros)
    with torch.no_grad():
        assert torch.equal(values(grid), k.dequantize())
    assert (pack(grid.quantized()) == pack(k)).all()


@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_trained_grid_computes_with_is_what_the_file_decodes_to(kind, keep_zeros):
    k, grid = grid_of(kind, keep_zeros=keep_zeros)
    disturb(grid)
    trained = unpack(pack(grid.quantized()), kind)
    with torch.no_grad():
        assert torch.equal(values(grid), trained.dequantize())
    assert 0.1 < (trained.codes != k.codes).float().mean() < 0.9
    assert not torch.equal(trained.d, k.d)
    assert torch.equal(trained.scales, k.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_slow_reference(kind):
    _, grid = grid_of(kind)
    disturb(grid)
    parameters = [grid.place, grid.gain, grid.min_gain]
    weights = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    fast = torch.autograd.grad((values(grid) * weights).sum(), parameters)
    slow = torch.autograd.grad((slow_value(grid) * weights).sum(), parameters, allow_unused=True)
    assert torch.allclose(values(grid), slow_value(grid))
    for ours, reference in zip(fast, slow, strict=True):
        assert torch.allclose(ours, torch.zeros_like(ours) if reference is None else reference, atol=1e-6)
    assert fast[0].count_nonzero() and fast[1].count_nonzero()
    assert bool(fast[2].count_nonzero()) == (kind == "Q2_K")


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_weights_never_change_their_code(kind):
    k, grid = grid_of(kind)
    optimizer = torch.optim.AdamW(grid.parameters(), lr=0.3, weight_decay=0.0)
    target = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    for _ in range(5):
        optimizer.zero_grad()
        ((values(grid) - target) ** 2).sum().backward()
        optimizer.step()
    trained, pruned = grid.quantized(), half_zero() == 0
    assert torch.equal(trained.codes[pruned], k.codes[pruned])
    assert not torch.equal(trained.codes[~pruned], k.codes[~pruned])
    if kind != "Q2_K":
        assert (trained.dequantize()[pruned] == 0).all()


def test_zeros_that_were_kept_in_q2_k_stay_zeros_whatever_the_scales_become():
    k, grid = grid_of("Q2_K", keep_zeros=True)
    disturb(grid)
    trained = grid.quantized()
    assert not torch.equal(trained.d, k.d)
    assert (trained.dequantize()[half_zero() == 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_starts_where_it_was_before_rounding_but_in_its_codes_cell(kind):
    weight = half_zero()
    k, grid = grid_of(kind)
    with torch.no_grad():
        code = k.codes.reshape(ROWS, -1, 16).float() - KTYPES[kind].zero_code
        assert ((grid.place - code).abs() <= CELL + 1e-4).all()
        step, minimum = grid.steps(*grid.blocks())
        inside = ((grid.place - code).abs() < CELL - 1e-3) & (step != 0)
        assert torch.allclose((grid.place * step - minimum)[inside], weight.reshape(code.shape)[inside], atol=1e-6)
    assert inside.float().mean() > 0.1


def test_a_matrix_of_zeros_stays_zero():
    k = encode(torch.zeros(2, 256), torch.eye(256), "Q2_K")
    grid = Grid(k, torch.zeros(2, 256), torch.ones(2, 256, dtype=torch.bool), False)
    value = values(grid)
    value.sum().backward()
    assert not value.any() and all(parameter.grad.isfinite().all() for parameter in grid.parameters())


def linear(transposed):
    torch.manual_seed(5)
    return Conv1D(ROWS, COLUMNS) if transposed else nn.Linear(COLUMNS, ROWS)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_module_on_a_grid_computes_with_it_and_keeps_it_when_taken_off(transposed):
    module, x = linear(transposed), torch.randn(3, COLUMNS)
    weight = half_zero()
    k = encode(weight, torch.eye(COLUMNS), "Q3_K", kept=weight != 0)
    grid = put_on_grid(module, k, weight, weight != 0)
    expected = x @ k.dequantize().T + module.bias
    assert torch.allclose(module(x), expected, atol=1e-5)
    module(x).square().sum().backward()
    assert grid.place.grad.count_nonzero()
    disturb(grid)
    trained = grid.quantized()
    take_off_grid(module)
    assert torch.equal(weight_of(module), trained.dequantize())
    assert {name for name, _ in module.named_parameters()} == {"weight", "bias"}


def test_a_narrower_matrix_trains_only_the_columns_it_has():
    weight = half_zero(columns=300)
    kept = weight != 0
    k = encode(nn.functional.pad(weight, (0, 212)), torch.eye(512), "Q3_K")
    grid = Grid(k, weight, kept, False)
    assert torch.equal(values(grid).detach(), k.dequantize()[:, :300])
    values(grid).square().sum().backward()
    assert not grid.place.grad.flatten(1)[:, 300:].any()


def test_the_given_matrix_is_left_as_it_was():
    k, grid = grid_of("Q2_K")
    before = replace(k, codes=k.codes.clone(), d=k.d.clone())
    disturb(grid)
    grid.quantized()
    assert torch.equal(k.codes, before.codes) and torch.equal(k.d, before.d)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_read_on_the_cpu_trains_on_a_gpu(kind):
    weight, module = half_zero(), nn.Linear(COLUMNS, ROWS).cuda()
    k: KQuant = encode(weight, torch.eye(COLUMNS), kind, kept=weight != 0)
    grid = put_on_grid(module, k, weight.cuda(), (weight != 0).cuda())
    module(torch.randn(3, COLUMNS).cuda()).square().sum().backward()
    assert grid.place.grad.count_nonzero()
    assert (pack(grid.quantized()) == pack(k)).all()
