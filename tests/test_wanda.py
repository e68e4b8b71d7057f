import pytest
import torch

from pipeline.activations import Gram
from pipeline.masks import Target, row_mask
from pipeline.sparsity import magnitude, random, wanda

RATIOS = [0.3, 1 / 3, 0.5]


def weight_of(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gram_of(x):
    return Gram(x.T @ x, len(x))


def generator():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("method", [magnitude, random, wanda])
@pytest.mark.parametrize("ratio", [0, *RATIOS])
def test_exactly_the_asked_share_goes_and_the_rest_keeps_its_value(method, ratio):
    weight, gram = weight_of(11, 13), gram_of(weight_of(50, 13, seed=1))
    before = weight.clone()
    pruned = method.prune(weight, gram, Target(ratio), generator())
    assert int((pruned == 0).sum()) == round(ratio * 11 * 13)
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
    assert torch.equal(weight, before)


@pytest.mark.parametrize("method", [magnitude, random, wanda])
def test_two_of_four_holds_in_every_group(method):
    weight, gram = weight_of(6, 16), gram_of(weight_of(50, 16, seed=1))
    pruned = method.prune(weight, gram, Target(0.5, 2, 4), generator())
    assert ((pruned.reshape(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_inputs_of_equal_norm_make_wanda_row_wise_magnitude(ratio):
    weight = weight_of(9, 13)
    pruned = wanda.prune(weight, Gram(torch.full((13, 13), 0.5) + 2 * torch.eye(13), 40), Target(ratio), generator())
    assert torch.equal(pruned, weight * row_mask(weight.abs(), ratio))


def test_wanda_drops_the_lowest_of_weight_times_input_norm_in_every_row():
    weight, x = weight_of(5, 8), weight_of(30, 8, seed=1) * torch.arange(1.0, 9)
    pruned = wanda.prune(weight, gram_of(x), Target(0.5), generator())
    for row, kept in zip(weight, pruned, strict=True):
        scores = [abs(float(row[i])) * float(x[:, i].norm()) for i in range(8)]
        assert {i for i in range(8) if kept[i] == 0} == set(sorted(range(8), key=scores.__getitem__)[:4])


@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, 2, 4)])
def test_an_input_that_never_fires_loses_its_weights_first(target):
    x = weight_of(50, 12, seed=1)
    x[:, [1, 6]] = 0
    pruned = wanda.prune(weight_of(10, 12) + 9 * (x[0] == 0), gram_of(x), target, generator())
    assert (pruned[:, [1, 6]] == 0).all()


def test_one_token_is_enough():
    pruned = wanda.prune(weight_of(10, 12), gram_of(weight_of(1, 12, seed=1)), Target(0.5), generator())
    assert torch.isfinite(pruned).all() and int((pruned == 0).sum()) == 60


def test_magnitude_drops_the_smallest_of_the_whole_matrix():
    pruned = magnitude.prune(weight := weight_of(10, 12), None, Target(0.3), generator())
    assert weight[pruned == 0].abs().max() < weight[pruned != 0].abs().min()


def test_random_is_decided_by_its_generator_alone():
    first, second = (random.prune(weight_of(10, 12, seed), None, Target(0.5), generator()) == 0 for seed in (0, 1))
    assert torch.equal(first, second)
