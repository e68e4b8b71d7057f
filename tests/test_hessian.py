import pytest
import torch

from pipeline.activations import Gram
from pipeline.errors import CheckFailed
from pipeline.hessian import DAMPING, inverse_factor


def inputs_of(tokens, width, seed=0):
    """(tokens, width) with columns that depend on each other, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)


def gram_of(x):
    return Gram(x.T @ x, len(x))


def damped(x):
    """H as the papers write it, a mean over tokens with the damping on its diagonal, in float64."""
    mean = x.double().T @ x.double() / len(x)
    return mean + DAMPING * mean.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)


def test_the_factor_is_upper_triangular_and_its_square_is_the_inverse_of_the_damped_hessian():
    x = inputs_of(200, 24)
    factor = inverse_factor(gram_of(x))
    assert torch.equal(factor, factor.triu()) and (factor.diagonal() > 0).all()
    inverse = torch.linalg.inv(damped(x))
    assert torch.allclose(factor.double().T @ factor.double(), inverse, rtol=1e-4, atol=1e-6 * inverse.abs().max())


def test_its_diagonal_is_what_is_left_of_the_inverse_when_the_columns_before_are_gone():
    """Row i of U divided by U_ii is what SparseGPT needs: the inverse of H without the columns it has passed."""
    x = inputs_of(100, 12)
    factor, hessian = inverse_factor(gram_of(x)).double(), damped(x)
    for i in range(12):
        rest = torch.linalg.inv(hessian[i:, i:])
        assert torch.allclose(factor[i, i] ** 2, rest[0, 0], rtol=1e-4)
        assert torch.allclose(factor[i, i:] / factor[i, i], rest[0] / rest[0, 0], rtol=1e-3, atol=1e-4)


def test_independent_inputs_of_one_size_give_a_multiple_of_the_identity():
    factor = inverse_factor(Gram(64 * torch.eye(8), 16))
    assert torch.allclose(factor, torch.eye(8) / (4 * (1 + DAMPING)) ** 0.5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_inputs_make_no_singular_hessian(tokens):
    x = inputs_of(tokens, 16)
    factor = inverse_factor(gram_of(x))
    assert torch.isfinite(factor).all() and (factor.diagonal() > 0).all()
    inverse = torch.linalg.inv(damped(x))
    assert torch.allclose(factor.double().T @ factor.double(), inverse, rtol=1e-3, atol=1e-5 * inverse.abs().max())


def test_an_input_that_never_fires_stands_alone_and_costs_less_than_any_other():
    x = inputs_of(100, 12) * 1e-3
    x[:, [2, 7]] = 0
    factor = inverse_factor(gram_of(x))
    cost = 1 / factor.diagonal() ** 2
    alive = [i for i in range(12) if i not in (2, 7)]
    assert cost[[2, 7]].max() < cost[alive].min()
    assert factor[2, 3:].abs().max() == 0 and factor[:2, 2].abs().max() == 0
    alone = inverse_factor(gram_of(x[:, alive]))
    assert torch.allclose(factor[alive][:, alive], alone, rtol=1e-4, atol=1e-6 * alone.abs().max())


def test_inputs_that_never_fire_at_all_are_no_crash():
    factor = inverse_factor(Gram(torch.zeros(4, 4), 10))
    assert torch.isfinite(factor).all() and torch.equal(factor, factor.diagonal().diag())


def test_the_size_of_the_inputs_does_not_matter_but_for_a_factor():
    x = inputs_of(100, 12)
    x[:, 5] = 0
    assert torch.allclose(inverse_factor(gram_of(x / 1024)), 1024 * inverse_factor(gram_of(x)), rtol=1e-4)


def test_more_damping_is_taken_where_the_matrix_is_not_definite():
    indefinite = torch.tensor([[1.0, 1.3], [1.3, 1.0]])  # what rounding can leave of a singular one, exaggerated
    factor = inverse_factor(Gram(indefinite, 1))
    assert torch.isfinite(factor).all()
    assert torch.linalg.inv((factor.T @ factor).double()).diagonal().min() > 1.3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_end_in_a_sentence_and_not_in_an_endless_loop(value):
    gram = torch.eye(4)
    gram[1, 2] = gram[2, 1] = value
    with pytest.raises(CheckFailed, match="not finite"):
        inverse_factor(Gram(gram, 1))


def test_no_tokens_at_all_end_in_a_sentence():
    with pytest.raises(CheckFailed, match="0 tokens"):
        inverse_factor(Gram(torch.zeros(4, 4), 0))


def test_a_matrix_that_no_damping_makes_definite_ends_in_a_sentence():
    with pytest.raises(CheckFailed, match="not a sum of squares"):
        inverse_factor(Gram(torch.tensor([[1.0, 1e6], [1e6, 1.0]]), 1))


def test_the_gram_matrix_is_left_as_it_was():
    gram = gram_of(inputs_of(3, 4))
    gram.total[1] = gram.total[:, 1] = 0
    before = gram.total.clone()
    inverse_factor(gram)
    inverse_factor(Gram(gram.total.double(), 1))
    assert torch.equal(gram.total, before)
