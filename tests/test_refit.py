from itertools import combinations

import torch

from pipeline.activations import Gram
from pipeline.hessian import damped
from pipeline.masks import Target
from pipeline.refit import error_of, exchanged, refit, reselect
from pipeline.sparsity import sparsegpt


def inputs(tokens=400, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)


def gram_of(x):
    return Gram(x.T @ x, len(x))


def matrix(rows=10, width=24, seed=1):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_every_row_gets_the_least_squares_of_the_weights_that_stay():
    dense, gram = matrix(), gram_of(inputs())
    pruned = sparsegpt.prune(dense, gram, Target(0.5))
    fitted = refit(pruned, dense, gram, steps=100)
    hessian = damped(gram).double()
    for row, mask, found in zip(dense, pruned != 0, fitted, strict=True):
        exact = torch.linalg.solve(hessian[mask][:, mask], hessian[mask] @ row.double())
        assert torch.allclose(found[mask].double(), exact, atol=1e-4)
    assert torch.equal(fitted == 0, pruned == 0)


def test_the_output_error_falls_below_sparsegpts():
    dense, x = matrix(), inputs()
    gram = gram_of(x)
    pruned = sparsegpt.prune(dense, gram, Target(0.5))
    errors = [((weight - dense) @ x.T).square().sum() for weight in (refit(pruned, dense, gram), pruned)]
    assert errors[0] < 0.95 * errors[1]


def test_what_was_not_pruned_stays_as_it_was():
    dense = matrix()
    assert torch.allclose(refit(dense.clone(), dense, gram_of(inputs())), dense)


def test_inputs_that_never_fire_give_no_nan():
    x = inputs()
    x[:, :5] = 0
    gram = gram_of(x)
    dense = matrix()
    assert torch.isfinite(refit(sparsegpt.prune(dense, gram, Target(0.5)), dense, gram)).all()


def test_reselecting_lowers_every_rows_error_at_the_same_count_of_zeros():
    dense, gram = matrix(), gram_of(inputs())
    pruned = sparsegpt.prune(dense, gram, Target(0.5))
    found = reselect(pruned, dense, gram)
    assert torch.equal((found == 0).sum(1), (pruned == 0).sum(1))
    before, after = (error_of(weight, dense, damped(gram)) for weight in (refit(pruned, dense, gram), found))
    assert (after <= before * (1 + 1e-4)).all() and after.sum() < 0.9 * before.sum()


def test_a_row_that_can_exchange_nothing_keeps_no_other_from_it():
    dense, gram = matrix(), gram_of(inputs())
    pruned = sparsegpt.prune(dense, gram, Target(0.5))
    alone = reselect(pruned[2:], dense[2:], gram)
    uneven = torch.cat([dense[:1], torch.zeros(1, 24), pruned[2:]])
    found = reselect(uneven, dense, gram)
    assert torch.equal((found == 0).sum(1), (uneven == 0).sum(1))
    assert torch.allclose(found[2:], alone, atol=1e-5) and not torch.equal(found[2:] == 0, pruned[2:] == 0)


def test_reselecting_finds_the_best_of_all_masks_of_a_narrow_matrix():
    dense, gram = matrix(width=8), gram_of(inputs(width=8))
    hessian = damped(gram)
    found = error_of(reselect(sparsegpt.prune(dense, gram, Target(0.5)), dense, gram), dense, hessian)
    best = torch.full_like(found, torch.inf)
    for columns in combinations(range(8), 4):
        mask = torch.zeros(8, dtype=torch.bool)
        mask[list(columns)] = True
        error = error_of(refit(dense * mask, dense, gram, steps=50), dense, hessian)
        best = torch.minimum(best, error)
    assert (found < 1.02 * best).float().mean() >= 0.5 and found.sum() < 1.5 * best.sum()


def test_nothing_pruned_or_nothing_left_leaves_nothing_to_exchange():
    dense, gram = matrix(), gram_of(inputs())
    hessian = damped(gram)
    for pruned in (dense, torch.zeros_like(dense)):
        assert exchanged(pruned, dense, hessian, hessian.diagonal(), 3) is pruned
        assert torch.allclose(reselect(pruned, dense, gram), pruned, atol=1e-5)
