from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.gptq import encode
from pipeline.grid import Grid, put_on_grid, take_off_grid
from pipeline.kquants import KTYPES, KQuant, pack, unpack
from pipeline.matrices import weight_of

KINDS = sorted(KTYPES)
ROWS, COLUMNS = 6, 512


def half_zero(seed=0, columns=COLUMNS):
    torch.manual_seed(seed)
    return 0.02 * torch.randn(ROWS, columns) * (torch.rand(ROWS, columns) < 0.5)


def grid_of(kind, *, seed=0, keep_zeros=False):
    weight = half_zero(seed)
    k = encode(weight, torch.eye(COLUMNS), kind, kept=weight != 0, keep_zeros=keep_zeros)
    return k, Grid(k, COLUMNS, transposed=False)


def values(grid):
    return grid(torch.zeros(0))


def disturb(grid, seed=1):
    """As training moves them: by a few percent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gain in grid.parameters():
            gain += 0.03 * torch.randn(gain.shape, generator=generator)


def slow_value(grid):
    """The same weight by torch's own operations, differentiable but for the rounding, which passes gradients on."""

    def as_half(x):
        return x + (x.half().float() - x).detach()

    k = grid.base
    d, dmin = k.d.float(), torch.zeros_like(k.d).float() if k.dmin is None else k.dmin.float()
    mins = torch.zeros_like(k.scales) if k.mins is None else k.mins
    step = as_half(d * (1 + grid.gain)).repeat_interleave(16, 1) * k.scales  # (R, C/16)
    minimum = as_half(dmin * (1 + grid.min_gain)).repeat_interleave(16, 1) * mins
    code = k.codes.float() - KTYPES[k.type].zero_code
    return step.repeat_interleave(16, 1) * code - minimum.repeat_interleave(16, 1)


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
    assert not torch.equal(trained.d, k.d)
    assert torch.equal(trained.scales, k.scales) and torch.equal(trained.codes, k.codes)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_slow_reference(kind):
    _, grid = grid_of(kind)
    disturb(grid)
    parameters = [grid.gain, grid.min_gain]
    weights = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    fast = torch.autograd.grad((values(grid) * weights).sum(), parameters)
    slow = torch.autograd.grad((slow_value(grid) * weights).sum(), parameters, allow_unused=True)
    assert torch.allclose(values(grid), slow_value(grid))
    for ours, reference in zip(fast, slow, strict=True):
        assert torch.allclose(ours, torch.zeros_like(ours) if reference is None else reference, atol=1e-6)
    assert fast[0].count_nonzero()
    assert bool(fast[1].count_nonzero()) == (kind == "Q2_K")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Q2_K"])
def test_pruned_weights_stay_zero_in_a_type_whose_grid_has_one(kind):
    _, grid = grid_of(kind)
    disturb(grid)
    assert (grid.quantized().dequantize()[half_zero() == 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_training_brings_the_matrix_nearer_to_its_aim(kind):
    k, grid = grid_of(kind)
    aim = 1.1 * k.dequantize()
    optimizer = torch.optim.AdamW(grid.parameters(), lr=0.02, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        ((values(grid) - aim) ** 2).sum().backward()
        optimizer.step()
    errors = [(each.dequantize() - aim).square().sum() for each in (grid.quantized(), k)]
    assert errors[0] < 0.2 * errors[1]


def test_zeros_that_were_kept_in_q2_k_stay_zeros_whatever_the_scales_become():
    k, grid = grid_of("Q2_K", keep_zeros=True)
    disturb(grid)
    trained = grid.quantized()
    assert not torch.equal(trained.d, k.d)
    assert (trained.dequantize()[half_zero() == 0] == 0).all()


def test_a_matrix_of_zeros_stays_zero():
    k = encode(torch.zeros(2, 256), torch.eye(256), "Q2_K")
    grid = Grid(k, 256, transposed=False)
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
    grid = put_on_grid(module, k)
    expected = x @ k.dequantize().T + module.bias
    assert torch.allclose(module(x), expected, atol=1e-5)
    module(x).square().sum().backward()
    assert grid.gain.grad.count_nonzero()
    disturb(grid)
    trained = grid.quantized()
    take_off_grid(module)
    assert torch.equal(weight_of(module), trained.dequantize())
    assert {name for name, _ in module.named_parameters()} == {"weight", "bias"}


def test_a_narrower_matrix_computes_with_the_columns_it_has():
    module = nn.Linear(300, ROWS)
    k = encode(nn.functional.pad(half_zero(columns=300), (0, 212)), torch.eye(512), "Q3_K")
    grid = put_on_grid(module, k)
    assert torch.equal(module.weight, k.dequantize()[:, :300])
    module.weight[:, :256].square().sum().backward()
    assert grid.gain.grad[:, 0].any() and not grid.gain.grad[:, 1].any()


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
    grid = put_on_grid(module, k)
    module(torch.randn(3, COLUMNS).cuda()).square().sum().backward()
    assert grid.gain.grad.count_nonzero()
    assert (pack(grid.quantized()) == pack(k)).all()
