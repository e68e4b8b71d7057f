import pytest
import torch

from pipeline.activations import Gram
from pipeline.gptq import encode
from pipeline.hessian import damped, inverse_factor
from pipeline.kquants import KTYPES, pack, unpack
from pipeline.polish import descend, polish, refit_blocks, regroup


def gaussian(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gram():
    """Of inputs that go together, as those of a model do: some combinations are strong, most are weak."""
    x = (gaussian(1200, 512, 0) * torch.logspace(0, -2, 512)) @ gaussian(512, 512, 1)
    return Gram(x.T @ x, len(x))


@pytest.fixture(scope="module")
def weight():
    return 0.05 * gaussian(40, 512, 2)


def error(quantized, weight, hessian):
    wrong = quantized.dequantize() - weight
    return float(((wrong @ hessian) * wrong).sum())


@pytest.mark.parametrize("kind", KTYPES)
def test_each_half_of_a_round_lowers_the_output_error_and_all_of_it_does_by_more(kind, gram, weight):
    hessian = damped(gram)
    before = encode(weight, inverse_factor(gram), kind)
    errors = [
        error(step, weight, hessian)
        for step in (
            before,
            refit_blocks(before, weight, hessian),
            descend(before, weight, hessian, None),
            polish(before, weight, hessian),
        )
    ]
    assert errors[1] < errors[0] and errors[2] < errors[0]
    assert errors[3] < min(errors[1:3]) and errors[3] < 0.97 * errors[0]


def test_descent_stops_where_no_single_code_can_be_better(gram, weight):
    """Against the slow way: every other code tried by itself."""
    hessian = damped(gram)
    found = encode(weight[:2], inverse_factor(gram), "Q3_K")
    for _ in range(30):
        found = descend(found, weight[:2], hessian, None)
    least = error(found, weight[:2], hessian)
    for row, column in ((0, 0), (0, 255), (0, 256), (1, 100), (1, 511)):
        for code in range(8):
            other = found.codes.clone()
            other[row, column] = code
            changed = type(found)(found.type, other, found.scales, None, found.d, None)
            assert error(changed, weight[:2], hessian) >= least * (1 - 1e-5)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K"])
def test_groups_are_moved_only_to_something_better_and_until_nothing_near_is(kind, gram, weight):
    hessian = damped(gram)
    found = encode(weight[:3], inverse_factor(gram), kind)
    errors = [error(found, weight[:3], hessian)]
    for _ in range(12):
        found = regroup(found, weight[:3], hessian, None)
        errors.append(error(found, weight[:3], hessian))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.98 * errors[0]
    assert errors[-1] == pytest.approx(errors[-2], rel=1e-3)
    assert torch.equal(unpack(pack(found), kind).dequantize(), found.dequantize())


def test_one_group_with_inputs_of_its_own_gets_the_best_scale_and_codes_of_all(weight):
    """Inputs that have nothing to do with each other: the nearest code is the best, so trying all scales is exact."""
    hessian, one = torch.eye(256), weight[:4, :256]
    found = encode(one, torch.eye(256), "Q3_K")
    for _ in range(40):
        found = regroup(found, one, hessian, None)
    least = ((found.dequantize() - one) ** 2).reshape(4, 16, 16).sum(-1)
    for scale in range(-32, 32):
        step = found.d.float().repeat_interleave(16, 1)[..., None] * scale
        codes = (one.reshape(4, 16, 16) / step).round().clamp(-4, 3) if scale else torch.zeros(4, 16, 16)
        near = (found.scales - scale).abs() <= 1
        assert ((step * codes - one.reshape(4, 16, 16)) ** 2).sum(-1)[near].ge(least[near] * (1 - 1e-4)).all()


def test_frozen_codes_stay_and_the_result_still_packs(gram, weight):
    sparse = weight * (gaussian(40, 512, 3) > 0)
    kept = sparse != 0
    before = encode(sparse, inverse_factor(gram), "Q3_K", kept=kept)
    after = polish(before, sparse, damped(gram), ~kept)
    assert torch.equal(after.dequantize()[~kept], torch.zeros(int((~kept).sum())))
    assert not torch.equal(after.scales, before.scales)
    assert torch.equal(unpack(pack(after), "Q3_K").dequantize(), after.dequantize())


def test_zeros_that_are_to_be_kept_stay_zero_in_a_type_with_minima(gram, weight):
    sparse = weight * (gaussian(40, 512, 3) > 0)
    kept = sparse != 0
    before = encode(sparse, inverse_factor(gram), "Q2_K", kept=kept, keep_zeros=True)
    after = polish(before, sparse, damped(gram), ~kept)
    assert not after.dequantize()[~kept].any()
    assert error(after, sparse, damped(gram)) < error(before, sparse, damped(gram))


def test_rows_in_parts_are_the_same_as_all_at_once(gram, weight, monkeypatch):
    before = encode(weight, inverse_factor(gram), "Q2_K")
    whole = polish(before, weight, damped(gram))
    monkeypatch.setattr("pipeline.polish.ROWS", 7)
    parts = polish(before, weight, damped(gram))
    assert (parts.codes != whole.codes).float().mean() < 1e-3  # sums of another order round another way
    assert error(parts, weight, damped(gram)) == pytest.approx(error(whole, weight, damped(gram)), rel=1e-3)


def test_an_all_zero_matrix_stays_zero(gram):
    zero = torch.zeros(3, 512)
    for kind in KTYPES:
        found = polish(encode(zero, inverse_factor(gram), kind), zero, damped(gram))
        assert not found.dequantize().any()
