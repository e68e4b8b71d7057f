from itertools import product

import pytest
import torch

from pipeline import kquant_fit as fit
from pipeline.kquant_fit import Choice, Group, Super
from pipeline.kquants import KTYPES

SYMMETRIC = ("Q3_K", "Q6_K")
HEAVY = torch.distributions.StudentT(2.0)


def groups(rows, seed=0):
    """`rows` groups of 16, a third of them normal, heavy-tailed and half zero, and what an error costs."""
    torch.manual_seed(seed)
    normal, heavy = torch.randn(rows, 16), HEAVY.sample((rows, 16))
    x = torch.where((torch.arange(rows) % 3 == 1)[:, None], heavy, normal)
    x *= ~((torch.arange(rows) % 3 == 2)[:, None] & (torch.rand(rows, 16) < 0.5))
    return 0.02 * x, torch.rand(16) + 0.05


def costs():
    return torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.05


def decoded(x, kind, block, group):
    """What the nearest codes decode to, one weight at a time."""
    ktype = KTYPES[kind]
    values = torch.zeros_like(x)
    for row in range(len(x)):
        step, minimum = (float(a[row]) * float(b[row]) for a, b in zip(block, group, strict=True))
        for i, weight in enumerate(x[row].tolist()):
            code = round((weight + minimum) / step) if step else 0
            code = min(max(code, -ktype.zero_code), ktype.max_code - ktype.zero_code)
            values[row, i] = step * code - minimum
    return values


def error_of(x, h, kind, block, group):
    return (h * (decoded(x, kind, block, group) - x) ** 2).sum(-1)


def best_of_all(x, h, kind, block, pairs):
    """The least error over all pairs of a stored scale and minimum, tried one after the other."""
    found = [
        error_of(x, h, kind, block, Group(torch.full((len(x),), float(s)), torch.full((len(x),), float(m))))
        for s, m in pairs
    ]
    return torch.stack(found).amin(0)


def all_pairs(kind):
    ktype = KTYPES[kind]
    return [(s, m) for s in range(ktype.min_scale, ktype.max_scale + 1) for m in range(ktype.max_min + 1)]


def on_grid(kind, rows, seed=0):
    """Groups that are exactly on a grid, the extremes of the codes among them: weights, block, group."""
    generator, ktype = torch.Generator().manual_seed(seed), KTYPES[kind]
    code = torch.randint(ktype.max_code + 1, (rows, 16), generator=generator)
    code[:, 0], code[:, 1] = 0, ktype.max_code
    scale = torch.randint(1, ktype.max_scale + 1, (rows,), generator=generator).float()
    minimum = torch.randint(ktype.max_min + 1, (rows,), generator=generator).float()
    d = (torch.rand(rows, generator=generator) / 100 + 1e-3).half().float()
    block, group = Super(d, d / 2 if ktype.max_min else torch.zeros(rows)), Group(scale, minimum)
    return (block.d * scale)[:, None] * (code - ktype.zero_code) - (block.dmin * minimum)[:, None], block, group


def test_dividing_by_nothing_gives_zero_and_never_a_nan():
    divisors = torch.tensor([0.0, 1e-45, -1e-40, 1e-38, 4.0])
    assert fit.over(torch.tensor(0.0), divisors).tolist() == [0] * 5
    assert fit.over(torch.tensor(3.0), divisors).tolist() == [0, 0, 0, 0, 0.75]


def test_halves_are_what_float16_holds_and_never_infinite():
    assert fit.half(torch.tensor([1e6, -1e6, 0.1])).tolist() == [65504, -65504, float(torch.tensor(0.1).half())]


def test_neighbours_are_whole_numbers_inside_the_bounds():
    found = fit.nearby(torch.tensor([0.2, 14.6]), 2, 0, 15)
    assert found.tolist() == [[0, 0, 0, 1, 2], [13, 14, 15, 15, 15]]


def test_the_best_real_scale_and_minimum_of_a_group_on_a_grid_leave_no_error():
    x, block, group = on_grid("Q2_K", 200)
    scale, minimum = fit.fit_affine(x, costs())
    assert torch.allclose(scale, block.d * group.scale, rtol=1e-4)
    assert torch.allclose(minimum, block.dmin * group.min, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", SYMMETRIC)
def test_the_best_real_scale_of_a_symmetric_group_on_a_grid_leaves_no_error(kind):
    x, block, group = on_grid(kind, 200)
    assert torch.allclose(fit.fit_symmetric(x, costs(), kind), block.d * group.scale, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-40])
def test_a_group_of_one_value_is_met(value):
    x, h = torch.full((2, 16), value), costs()
    scale, minimum = fit.fit_affine(x, h)
    code = fit.over(x + minimum[:, None], scale[:, None]).round().clamp(0, 3)
    assert torch.allclose(code * scale[:, None] - minimum[:, None], x, rtol=1e-5, atol=1e-12)
    for kind in SYMMETRIC:
        scale = fit.fit_symmetric(x, h, kind)[:, None]
        assert torch.allclose(scale * fit.over(x, scale).round(), x, rtol=1e-5, atol=1e-12)


def test_with_enough_reach_the_choice_is_the_best_of_all_stored_pairs():
    x, h = groups(30)
    block = Super(torch.full((30,), 0.001), torch.full((30,), 0.002))
    real = torch.zeros(30), torch.zeros(30)
    found = fit.affine_choice(x, h, block, real, (15, 15))
    assert torch.allclose(found.error, best_of_all(x, h, "Q2_K", block, all_pairs("Q2_K")), rtol=1e-4)
    assert torch.allclose(found.error, error_of(x, h, "Q2_K", block, found[:2]), rtol=1e-4)


def test_a_group_is_chosen_nearly_as_well_as_by_trying_all_stored_pairs():
    x, h = groups(60)
    block = Super(*(torch.full((60,), v).half().float() for v in (0.0013, 0.0021)))
    found = error_of(x, h, "Q2_K", block, fit.affine_group(x, h, block))
    best = best_of_all(x, h, "Q2_K", block, all_pairs("Q2_K"))
    assert (found >= best * 0.9999).all()
    assert found.sum() < 1.05 * best.sum()


@pytest.mark.parametrize("kind", SYMMETRIC)
def test_a_symmetric_group_is_chosen_nearly_as_well_as_by_trying_all_stored_scales(kind):
    x, h = groups(30)
    d = (x.abs().amax(-1) / 20 / KTYPES[kind].zero_code).half().float()
    block = Super(d, torch.zeros(30))
    found = error_of(x, h, kind, block, fit.symmetric_group(x, h, block, kind))
    best = best_of_all(x, h, kind, block, all_pairs(kind))
    assert (found >= best * 0.9999).all()
    assert found.sum() < 1.05 * best.sum()


def test_a_group_on_the_grid_of_its_block_is_met_exactly():
    x, block, _ = on_grid("Q2_K", 200)
    assert torch.allclose(decoded(x, "Q2_K", block, fit.affine_group(x, torch.ones(16), block)), x, atol=1e-7)
    for kind in SYMMETRIC:
        x, block, _ = on_grid(kind, 200)
        found = fit.symmetric_group(x, torch.ones(16), block, kind)
        assert torch.allclose(decoded(x, kind, block, found), x, atol=1e-7)


def block_error(x, h, block):
    """Of a whole block, each of its groups chosen for itself."""
    return sum(
        error_of(x[:, g], h[g], "Q2_K", block, fit.affine_group(x[:, g], h[g], block)).sum() for g in range(x.shape[1])
    )


def test_refining_d_and_dmin_is_the_least_squares_solution():
    x, h = groups(16 * 4)
    x, h = x.reshape(4, 16, 16), h.expand(16, 16)
    block = Super(torch.full((4,), 0.0012).half().float(), torch.full((4,), 0.0025).half().float())
    real = fit.fit_affine(x, h)
    found = fit.affine_choice(x, h, Super(block.d[:, None], block.dmin[:, None]), real, (1, 1))
    new = fit.refined(x, h, block, found)
    for row in range(4):
        step, minimum = block.d[row] * found.scale[row], block.dmin[row] * found.min[row]
        code = fit.over(x[row] + minimum[:, None], step[:, None]).round().clamp(0, 3)
        root = h.flatten().sqrt()[:, None]
        columns = torch.stack([(found.scale[row][:, None] * code).flatten(), -found.min[row].repeat_interleave(16)], 1)
        expected = torch.linalg.lstsq((root * columns).double(), (root[:, 0] * x[row].flatten()).double()[:, None])
        assert new.d[row] == pytest.approx(float(expected.solution[0]), rel=2e-3)  # float16
        assert new.dmin[row] == pytest.approx(float(expected.solution[1]), rel=2e-3)


def test_no_single_start_of_the_search_for_a_block_is_better_than_what_it_finds(monkeypatch):
    x, h = groups(16 * 8, seed=3)
    x, h = x.reshape(8, 16, 16), h.expand(16, 16)
    found = block_error(x, h, fit.affine_super(x, h))
    starts = list(product(fit.SUPER, fit.SUPER_MIN))
    monkeypatch.setattr(fit, "REFINEMENTS", 0)
    for high, low in starts:
        monkeypatch.setattr(fit, "SUPER", (high,))
        monkeypatch.setattr(fit, "SUPER_MIN", (low,))
        assert found < block_error(x, h, fit.affine_super(x, h))


def test_the_better_of_two_is_taken_row_by_row():
    def tried(d, error):
        d, error = torch.tensor(d), torch.tensor(error)
        return Super(d, -d), Choice(d[:, None].expand(2, 16), d[:, None].expand(2, 16), error[:, None]), error

    block, choice, error = fit.better_of(tried([1.0, 2.0], [5.0, 5.0]), tried([3.0, 4.0], [6.0, 4.0]))
    assert block.d.tolist() == [1, 4] and block.dmin.tolist() == [-1, -4]
    assert choice.scale[:, 7].tolist() == [1, 4] and error.tolist() == [5, 4]


def pairs_with_zero():
    """Scales and minima with a code that decodes to zero, where dmin is twice d."""
    return [(s, m) for s, m in all_pairs("Q2_K") if any(code * s == 2 * m for code in range(4))]


@pytest.mark.parametrize("pruned", [False, True])
def test_a_grid_with_zero_is_the_best_of_all_that_have_it(pruned):
    x, h = groups(30)
    kept = x != 0 if pruned else torch.ones_like(x)
    block = fit.zero_super(x.reshape(30, 1, 16), h)
    assert torch.equal(2 * block.d, block.dmin)
    found = fit.zero_group(x, h, block, kept)
    assert all(pair in pairs_with_zero() for pair in zip(found.scale.tolist(), found.min.tolist(), strict=True))
    best = best_of_all(x, h * kept, "Q2_K", block, pairs_with_zero())
    assert torch.allclose(error_of(x, h * kept, "Q2_K", block, found), best, rtol=1e-4)


def test_a_grid_with_zero_has_room_for_the_largest_weight():
    x = torch.zeros(2, 16, 16)
    x[0, 3, 5], x[1, 3, 5] = 1.0, -1.0
    block = fit.zero_super(x, torch.ones(16, 16))
    for row in range(2):
        one = Super(block.d[row : row + 1], block.dmin[row : row + 1])
        group = x[row, 3:4]
        value = decoded(group, "Q2_K", one, fit.zero_group(group, torch.ones(16), one, torch.ones(1, 16)))
        assert float(value[0, 5]) == pytest.approx(float(x[row, 3, 5]), rel=1e-3)
