import pytest
import torch

from pipeline.activations import Gram
from pipeline.hessian import DAMPING
from pipeline.masks import Target
from pipeline.sparsity import magnitude, wanda
from pipeline.sparsity.sparsegpt import prune

TARGETS = [Target(0.5), Target(0.3), Target(1 / 3), Target(0.5, 2, 4), Target(0.75, 1, 4)]


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(tokens, width, seed=1):
    """Inputs (tokens, width) of few directions and unequal sizes, as a transformer's are."""
    directions = gaussian(max(width // 4, 1), width, seed)
    sizes = torch.linspace(0.2, 3, width)
    return (gaussian(tokens, len(directions), seed + 1) @ directions + 0.3 * gaussian(tokens, width, seed + 2)) * sizes


def gram_of(x):
    return Gram(x.T @ x, len(x))


def output_error(pruned, weight, x):
    return float((x @ (pruned - weight).T).square().sum() / (x @ weight.T).square().sum())


def slow(weight, gram, target, block):
    """SparseGPT without its Cholesky factor: the Hessian of the columns that are left is inverted for every column."""
    hessian = gram.total.double() / gram.tokens
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    weight, mask = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    left = [torch.linalg.inv(hessian[i:, i:]) for i in range(len(hessian))]
    cost = torch.stack([1 / inverse[0, 0] for inverse in left])
    at_once = target.group or block
    for i, inverse in enumerate(left):
        if i % at_once == 0:
            part = slice(i, i + at_once)
            scores = weight[:, part] ** 2 * cost[part]
            mask[:, part] = target.mask(scores) if target.group else target.column_mask(scores, i, len(hessian))
        gone = torch.where(mask[:, i], 0, weight[:, i])
        weight[:, i:] -= torch.outer(gone / inverse[0, 0], inverse[0])
        weight[~mask[:, i], i] = 0  # but for rounding it is
    return weight.float()


@pytest.mark.parametrize("block", [4, 7, 8, 24, 128])
@pytest.mark.parametrize("target", [*TARGETS, Target(0.9)])
def test_it_is_the_algorithm_that_inverts_a_matrix_for_every_column(target, block):
    weight, gram = gaussian(9, 24), gram_of(correlated(200, 24))
    found, expected = prune(weight, gram, target, block=block), slow(weight, gram, target, block)
    assert torch.equal(found == 0, expected == 0)
    assert torch.allclose(found, expected, atol=1e-4)


def test_blocks_of_128_equal_the_whole_width_where_the_masks_are_chosen_alike():
    weight, gram, target = gaussian(16, 320), gram_of(correlated(900, 320)), Target(0.5, 2, 4)
    blocked, whole = prune(weight, gram, target), prune(weight, gram, target, block=320)
    assert torch.equal(blocked == 0, whole == 0)
    assert torch.allclose(blocked, whole, atol=1e-4)


def test_the_weights_that_stay_make_up_for_what_went_as_well_as_they_can():
    """When one column goes, the others move as in the least squares problem that the paper starts from."""
    weight, gram = gaussian(5, 12), gram_of(correlated(200, 12))
    weight[:, 0] *= 0.02  # so that it is the first column that goes
    pruned = prune(weight, gram, Target(1 / 12), block=12)
    assert (pruned[:, 0] == 0).all() and (pruned[:, 1:] != 0).all()
    hessian = gram.total.double() / gram.tokens
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    best = torch.linalg.solve(hessian[1:, 1:], hessian[1:, :1] @ weight[:, :1].double().T).T
    assert torch.allclose((pruned - weight)[:, 1:].double(), best, atol=1e-5)
    assert best.abs().max() > 1e-3


@pytest.mark.parametrize("block", [5, 128])
def test_ratio_zero_is_the_identity(block):
    weight = gaussian(6, 13)
    assert torch.equal(prune(weight, gram_of(correlated(50, 13)), Target(0), block=block), weight)


@pytest.mark.parametrize("target", TARGETS)
def test_independent_inputs_of_one_size_make_it_magnitude_and_no_weight_moves(target):
    weight = gaussian(7, 12)
    pruned = prune(weight, Gram(30 * torch.eye(12), 10), target, block=12)
    assert torch.equal(pruned, magnitude.prune(weight, None, target, None))


@pytest.mark.parametrize("target", [Target(0.5), Target(0.3), Target(0.5, 2, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_its_outputs_are_closer_than_wandas_and_wandas_than_magnitudes(target, seed):
    weight, x = gaussian(48, 64, seed), correlated(600, 64, seed + 10)
    errors = [
        output_error(method(weight, gram_of(x), target, None), weight, x)
        for method in (prune, wanda.prune, magnitude.prune)
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("ratio", [0.3, 1 / 3, 0.5, 0.77])
@pytest.mark.parametrize("block", [1, 4, 13, 128])
def test_exactly_the_asked_share_goes_whatever_the_block(ratio, block):
    weight = gaussian(11, 37)
    before = weight.clone()
    pruned = prune(weight, gram_of(correlated(90, 37)), Target(ratio), block=block)
    assert int((pruned == 0).sum()) == round(ratio * 11 * 37)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 8)])
@pytest.mark.parametrize("block", [5, 128])
def test_n_of_m_holds_in_every_group(pattern, block):
    target = Target(1 - pattern[0] / pattern[1], *pattern)
    pruned = prune(gaussian(6, 40), gram_of(correlated(90, 40)), target, block=block)
    assert ((pruned.reshape(-1, pattern[1]) != 0).sum(1) == pattern[0]).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs_neither_crash_nor_give_nan(tokens, target):
    x = correlated(tokens, 40)
    pruned = prune(weight := gaussian(6, 40), gram_of(x), target)
    assert torch.isfinite(pruned).all()
    assert int((pruned == 0).sum()) == round(target.ratio * 240)
    assert output_error(pruned, weight, x) < output_error(magnitude.prune(weight, None, target, None), weight, x)


@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, 2, 4)])
@pytest.mark.parametrize("size", [1e-3, 1, 1e3])
def test_an_input_that_never_fires_loses_its_weights_first(target, size):
    x = correlated(90, 24) * size
    x[:, [1, 6, 20]] = 0
    weight = gaussian(8, 24)
    weight[:, [1, 6, 20]] += 9
    pruned = prune(weight, gram_of(x), target, block=8)
    assert torch.isfinite(pruned).all()
    assert (pruned[:, [1, 6, 20]] == 0).all()
    assert int((pruned == 0).sum()) == 96


def test_no_more_than_the_asked_share_goes_when_most_inputs_never_fire():
    x = correlated(90, 24)
    x[:, 4:] = 0
    pruned = prune(weight := gaussian(8, 24), gram_of(x), Target(0.5))
    assert int((pruned == 0).sum()) == 96
    assert torch.equal(pruned[:, :4], weight[:, :4])


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_never_fire_at_all_are_no_crash(target):
    pruned = prune(gaussian(6, 12), Gram(torch.zeros(12, 12), 3), target)
    assert torch.isfinite(pruned).all() and int((pruned == 0).sum()) == round(target.ratio * 72)


@pytest.mark.parametrize("target", TARGETS)
def test_the_size_of_the_inputs_does_not_matter(target):
    weight, x = gaussian(6, 24), correlated(90, 24)
    x[:, 5] = 0
    small, large = prune(weight, gram_of(x / 256), target), prune(weight, gram_of(x * 256), target)
    assert torch.equal(small == 0, large == 0) and torch.allclose(small, large, rtol=1e-4, atol=1e-5)
