from itertools import product

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from pipeline import gptq
from pipeline.activations import Gram
from pipeline.errors import CheckFailed
from pipeline.gptq import encode
from pipeline.hessian import inverse_factor
from pipeline.kquants import KTYPES, KQuant, pack, unpack

KINDS = sorted(KTYPES)
SHAPES = ("normal", "heavy-tailed", "half zero", "shifted")
COLUMNS = 512


def matrix(shape, rows=32, columns=COLUMNS, seed=0):
    torch.manual_seed(seed)
    if shape == "heavy-tailed":
        return 0.02 * torch.distributions.StudentT(2.0).sample((rows, columns))
    weight = 0.02 * torch.randn(rows, columns)
    if shape == "half zero":
        weight *= torch.rand(rows, columns) < 0.5
    return weight + 0.03 if shape == "shifted" else weight


def importance(columns=COLUMNS, seed=0):
    return (3 * torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.05) ** 2


def correlated(columns=COLUMNS, seed=0):
    """Second moments of inputs that share much of what they say, as a layer's do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(1500, columns, generator=generator) @ (
        torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=generator)
    )
    inputs = (mixed + 3 * torch.randn(1500, 1, generator=generator)) * (
        2 * torch.rand(columns, generator=generator) + 0.1
    )
    return Gram(inputs.T @ inputs, len(inputs))


def factor_of(diagonal):
    """For inputs that are not correlated: no error is spread."""
    return torch.diag(1 / diagonal.sqrt())


def stock(weight, kind, diagonal):
    """What llama-quantize makes of it with this importance matrix."""
    libgguf = pytest.importorskip("libgguf")
    data = libgguf.quantize_rows(weight.numpy(), int(GGMLQuantizationType[kind]), diagonal.numpy())
    return torch.from_numpy(dequantize(np.asarray(data), GGMLQuantizationType[kind]))


def cost(error, hessian):
    return float(((error @ hessian) * error).sum())


def on_grid(kind, rows=16, columns=COLUMNS, seed=0):
    """Any matrix of the type whose blocks use the whole range of their scales and whose groups that of their codes."""
    generator, ktype = torch.Generator().manual_seed(seed), KTYPES[kind]

    def integers(low, high, width):
        return torch.randint(low, high + 1, (rows, columns // width), generator=generator)

    codes, scales = integers(0, ktype.max_code, 1), integers(max(ktype.min_scale, 1), ktype.max_scale, 16)
    codes[:, ::16], codes[:, 5::16] = 0, ktype.max_code
    scales[:, ::16] = ktype.min_scale or ktype.max_scale
    d = (torch.rand(rows, columns // 256, generator=generator) / 100 + 1e-3).half()
    if not ktype.max_min:
        d *= torch.where(torch.rand(d.shape, generator=generator) < 0.5, -1, 1)
        return KQuant(kind, codes.to(torch.uint8), scales.to(torch.int16), None, d, None)
    mins = integers(0, ktype.max_min, 16)
    mins[:, 3::16] = ktype.max_min
    return KQuant(kind, codes.to(torch.uint8), scales.to(torch.int16), mins.to(torch.int16), d, (1.5 * d).half())


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_that_is_on_the_grid_encodes_to_itself(kind):
    weight = on_grid(kind).dequantize()
    for factor in (torch.eye(COLUMNS), inverse_factor(correlated())):
        found = encode(weight, factor, kind).dequantize()
        assert torch.equal(found, weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_feedback_the_weighted_error_is_at_most_that_of_llama_quantize(kind, shape):
    weight = matrix(shape)
    for diagonal in (torch.ones(COLUMNS), importance()):
        ours = encode(weight, factor_of(diagonal), kind).dequantize()
        assert (diagonal * (ours - weight) ** 2).sum() <= (
            diagonal * (stock(weight, kind, diagonal) - weight) ** 2
        ).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_feedback_the_error_of_the_outputs_is_far_below_that_of_llama_quantize(kind, shape):
    weight, gram = matrix(shape), correlated()
    kept = weight != 0 if shape == "half zero" else None
    ours = encode(weight, inverse_factor(gram), kind, kept=kept).dequantize()
    theirs = stock(weight, kind, gram.mean.diagonal().contiguous())
    share = 0.9 if shape == "half zero" else 0.6  # errors are not spread to pruned weights
    assert cost(ours - weight, gram.mean) < share * cost(theirs - weight, gram.mean)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_encoded_a_few_at_a_time_are_the_same_rows(kind, monkeypatch):
    """But for products of another shape, which round their sums another way: now and then that is another code, and
    what follows in its row another compromise as good."""
    gram = correlated()
    factor = inverse_factor(gram)
    weight = matrix("half zero", rows=23)
    whole = encode(weight, factor, kind, kept=weight != 0)
    monkeypatch.setattr(gptq, "ROWS", 7)
    parts = encode(weight, factor, kind, kept=weight != 0)
    assert (parts.codes != whole.codes).any(1).sum() <= 3
    costs = [cost(found.dequantize() - weight, gram.mean) for found in (whole, parts)]
    assert costs[1] == pytest.approx(costs[0], rel=0.02)


def rounded_one_by_one(weight, k, hessian, kept):
    """Optimal Brain Quantization in the order of the columns: after each, the inverse Hessian of those that are left.

    The scales are those of `k`; what comes out are the codes.
    """
    ktype, (rows, columns) = KTYPES[k.type], weight.shape
    step = (k.d.double()[..., None] * k.scales.reshape(rows, -1, 16)).flatten(1).repeat_interleave(16, 1)
    minimum = torch.zeros_like(step)
    if k.mins is not None:
        minimum = (k.dmin.double()[..., None] * k.mins.reshape(rows, -1, 16)).flatten(1).repeat_interleave(16, 1)
    inverse, now, codes = torch.linalg.inv(hessian.double()), weight.double().clone(), torch.zeros(rows, columns)
    for i in range(columns):
        code = torch.where(step[:, i] == 0, 0, (now[:, i] + minimum[:, i]) / step[:, i]).round() + ktype.zero_code
        codes[:, i] = code.clamp(0, ktype.max_code)
        value = step[:, i] * (codes[:, i] - ktype.zero_code) - minimum[:, i]
        error = (now[:, i] - value) / inverse[0, 0]
        now[:, i + 1 :] -= error[:, None] * inverse[0, 1:]
        now *= kept
        inverse = (inverse - inverse[:, :1] @ inverse[:1] / inverse[0, 0])[1:, 1:]
    return codes


@pytest.mark.parametrize("kind", KINDS)
def test_blocked_feedback_is_that_of_an_inverse_hessian_taken_apart_column_by_column(kind):
    weight, gram = matrix("normal", rows=8), correlated()
    kept = torch.rand(weight.shape) < 0.7
    hessian = gram.mean + torch.eye(COLUMNS) * (0.01 * gram.mean.diagonal().mean())  # as inverse_factor damps it
    found = encode(weight * kept, inverse_factor(gram), kind, kept=kept)
    expected = rounded_one_by_one(weight * kept, found, hessian, kept)
    # float32 against float64: a weight in the middle between two codes may go either way, and those after it with it
    assert (found.codes == expected).float().mean() > 0.99


def test_stock_q2_k_keeps_hardly_a_zero_and_without_an_importance_matrix_fits_them_worst_of_all():
    """Why there is one by default. The symmetric types keep all either way."""
    libgguf = pytest.importorskip("libgguf")
    weight = matrix("half zero")
    pruned = (weight == 0).numpy()

    def rounded(kind, given):
        data = libgguf.quantize_rows(weight.numpy(), int(GGMLQuantizationType[kind]), given)
        return dequantize(np.asarray(data), GGMLQuantizationType[kind])

    plain, weighted = (np.square(rounded("Q2_K", given) - weight.numpy()) for given in (None, np.ones(COLUMNS, "f")))
    assert (rounded("Q2_K", None)[pruned] == 0).mean() < 0.03
    assert plain[pruned].mean() > 1.3 * plain[~pruned].mean()
    assert weighted[pruned].mean() < 0.5 * weighted[~pruned].mean()
    for kind, given in product(("Q3_K", "Q6_K"), (None, np.ones(COLUMNS, "f"))):
        assert not rounded(kind, given)[pruned].any()


@pytest.mark.parametrize("kind", ["Q3_K", "Q6_K"])
def test_pruned_weights_stay_zero_in_the_symmetric_types(kind):
    weight = matrix("half zero")
    found = encode(weight, inverse_factor(correlated()), kind, kept=weight != 0).dequantize()
    assert (found[weight == 0] == 0).all()


def test_q2_k_keeps_zeros_only_if_asked_and_at_a_price():
    weight, gram = matrix("half zero"), correlated()
    factor, kept = inverse_factor(gram), weight != 0
    free = encode(weight, factor, "Q2_K", kept=kept).dequantize()
    exact = encode(weight, factor, "Q2_K", kept=kept, keep_zeros=True).dequantize()
    assert (free[weight == 0] == 0).float().mean() < 0.5
    assert (exact[weight == 0] == 0).all()
    assert cost(exact - weight, gram.mean) > 1.05 * cost(free - weight, gram.mean)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_zeros_are_zero_in_the_bytes_of_the_file(kind):
    weight = matrix("half zero", rows=5, seed=4)
    k = encode(weight, inverse_factor(correlated()), kind, kept=weight != 0, keep_zeros=True)
    assert (dequantize(pack(k), GGMLQuantizationType[kind])[(weight == 0).numpy()] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_no_number_is_refused(kind):
    for value in (float("nan"), float("inf")):
        weight = matrix("normal", rows=2)
        weight[1, 300] = value
        with pytest.raises(CheckFailed, match="weights that are not finite"):
            encode(weight, torch.eye(COLUMNS), kind)


@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-40])
def test_a_matrix_of_one_value_is_encoded(kind, value, keep_zeros):
    weight = torch.full((3, 256), value)
    k = encode(weight, torch.eye(256), kind, kept=weight != 0, keep_zeros=keep_zeros)
    assert torch.allclose(unpack(pack(k), kind).dequantize(), weight, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_next_to_a_much_larger_one_are_encoded_by_themselves(kind):
    weight = matrix("normal", rows=2)
    alone = encode(weight[:1], torch.eye(COLUMNS), kind).dequantize()
    weight[1] *= 1e4
    assert torch.equal(encode(weight, torch.eye(COLUMNS), kind).dequantize()[:1], alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_encodes_as_well_as_a_cpu(kind, keep_zeros):
    weight, gram = matrix("half zero"), correlated()
    factor, kept = inverse_factor(gram), weight != 0
    costs = [
        cost(
            encode(weight.to(device), factor.to(device), kind, kept=kept.to(device), keep_zeros=keep_zeros)
            .dequantize()
            .cpu()
            - weight,
            gram.mean,
        )
        for device in ("cpu", "cuda")
    ]
    assert costs[1] == pytest.approx(costs[0], rel=0.02)
