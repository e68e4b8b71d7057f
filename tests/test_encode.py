import copy

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.activations import HEAD, input_squares, walk
from pipeline.encode import encode_model, encode_module, padded, take_unpruned, to_adapt
from pipeline.kquants import unpack
from pipeline.matrices import block_matrices, weight_of

SEQUENCES = [torch.randint(0, 64, (24,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(40)]
ROLES = {"c_attn": "Q3_K", "attn.c_proj": "Q6_K", "c_fc": "Q2_K", "mlp.c_proj": "Q3_K"}


def gpt2(width=256):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=width, n_inner=width, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).eval()


def types_of(model):
    """As in a file of type Q2_K; Q6_K, too, for what is not the head."""
    return {name: next(t for role, t in ROLES.items() if name.endswith(role)) for name in block_matrices(model)}


@torch.no_grad()
def half_zero(model):
    for module in block_matrices(model).values():
        weight = weight_of(module)
        weight *= weight.abs() > weight.abs().median()
    return model


def weights_of(model):
    return {name: weight_of(module).clone() for name, module in block_matrices(model).items()}


@torch.no_grad()
def outputs(model):
    """What the last block makes of the texts."""
    return torch.cat([model.transformer(torch.tensor([ids])).last_hidden_state[0] for ids in SEQUENCES])


def test_every_matrix_gets_its_type_and_the_model_computes_with_what_the_file_decodes_to():
    model = gpt2()
    types = types_of(model) | {HEAD: "Q6_K"}
    before = weights_of(model)
    found = encode_model(model, SEQUENCES, types)
    assert {name: k.type for name, k in found.items()} == types
    for name, module in block_matrices(model).items():
        assert torch.equal(weight_of(module), found[name].dequantize()), name
        assert 0 < (weight_of(module) - before[name]).square().mean() < 0.2 * before[name].square().mean(), name
    assert torch.equal(model.lm_head.weight, found[HEAD].dequantize())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_matrices_that_are_not_named_stay_or_become_what_the_file_has():
    model = gpt2()
    before = weights_of(model)
    first, second, third = list(before)[:3]
    found = encode_model(model, SEQUENCES, {third: "Q3_K"}, others={first: before[first] + 1})
    assert list(found) == [third]
    after = weights_of(model)
    assert torch.equal(after[first], before[first] + 1) and torch.equal(after[second], before[second])
    assert torch.equal(after[third], found[third].dequantize())


def test_each_block_is_fitted_to_what_the_quantized_blocks_before_it_make():
    """The second block, encoded by hand on a model whose first block is the quantized one."""
    model, by_hand = gpt2(), gpt2()
    name = "transformer.h.1.mlp.c_fc"
    found = encode_model(model, SEQUENCES, types_of(model))
    for other, module in block_matrices(by_hand).items():
        if ".0." in other:
            weight_of(module).data.copy_(found[other].dequantize())
    for block in walk(by_hand, SEQUENCES, "test"):
        if name in block:
            module, gram = block[name]
            expected = encode_module(module, gram, "Q2_K", pruned=True, keep_zeros=False)
    assert torch.equal(found[name].codes, expected.codes)
    alone = encode_model(gpt2(), SEQUENCES, {name: "Q2_K"})[name]
    assert not torch.equal(alone.codes, expected.codes)


def test_the_outputs_are_nearer_to_the_models_than_those_of_llama_quantize():
    libgguf = pytest.importorskip("libgguf")
    whole, ours, theirs = gpt2(), gpt2(), gpt2()
    squares = input_squares(whole, SEQUENCES)
    encode_model(ours, SEQUENCES, types_of(ours))
    for name, module in block_matrices(theirs).items():
        kind, means = types_of(theirs)[name], squares[name].sums / squares[name].tokens
        data = libgguf.quantize_rows(
            weight_of(module).contiguous().numpy(), int(GGMLQuantizationType[kind]), means.numpy()
        )
        weight_of(module).data.copy_(unpack(np.asarray(data), kind).dequantize())
    needed = outputs(whole)
    errors = [(outputs(model) - needed).square().mean() for model in (ours, theirs)]
    assert errors[0] < 0.7 * errors[1]


def test_zeros_of_block_matrices_count_as_pruned_and_those_of_the_head_do_not():
    model = half_zero(gpt2())
    model.lm_head.weight.data[:, ::2] = 0
    zeros = {name: weight == 0 for name, weight in weights_of(model).items()}
    types = types_of(model) | {HEAD: "Q2_K"}
    found = encode_model(model, SEQUENCES, types, keep_zeros=True)
    for name, pruned in zeros.items():
        assert (found[name].dequantize()[pruned] == 0).all(), name
    assert (found[HEAD].dequantize()[:, ::2] != 0).any()


def test_zeros_survive_in_symmetric_types_and_not_in_q2_k_unless_they_are_kept():
    model = half_zero(gpt2())
    zeros = {name: weight == 0 for name, weight in weights_of(model).items()}
    found = encode_model(model, SEQUENCES, types_of(model))
    shares = {name: float((k.dequantize()[zeros[name]] == 0).float().mean()) for name, k in found.items()}
    assert all((share == 1) == (found[name].type != "Q2_K") for name, share in shares.items())


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_what_would_lose_its_zeros_is_rounded_from_the_weights_before_pruning(keep_zeros):
    dense, pruned = gpt2(), half_zero(gpt2())
    before, given = weights_of(pruned), weights_of(dense)
    types = types_of(pruned) | {HEAD: "Q6_K"}
    loads = []
    taken = take_unpruned(pruned, lambda: loads.append(dense) or dense, types, keep_zeros)
    assert len(loads) == (not keep_zeros)  # nothing is loaded for nothing
    assert set(taken) == {name for name in before if types[name] == "Q2_K" and not keep_zeros}
    for name, weight in weights_of(pruned).items():
        expected = given if types[name] == "Q2_K" and not keep_zeros else before
        assert torch.equal(weight, expected[name]), name
    assert {"Q2_K", "Q3_K"} <= set(types.values())


def test_rows_that_are_no_whole_blocks_are_filled_with_zeros_for_a_bench():
    model = gpt2(width=192)
    before = weights_of(model)
    found = encode_model(model, SEQUENCES, types_of(model))
    k = found["transformer.h.0.mlp.c_fc"]
    assert k.codes.shape == (192, 256)
    assert torch.equal(weight_of(model.transformer.h[0].mlp.c_fc), k.dequantize()[:, :192])
    assert torch.equal(padded(before["transformer.h.0.mlp.c_fc"], 256)[:, 192:], torch.zeros(192, 64))
    worst = max(float((weight_of(m) - before[n]).square().mean() / before[n].square().mean())
                for n, m in block_matrices(model).items())  # fmt: skip
    assert worst < 0.25  # random weights: about 0.2, and arithmetic differs between machines


@pytest.mark.parametrize("sequences", [[[5, 6]], [[7] * 20]])
def test_a_text_of_a_few_tokens_or_of_one_word_is_enough_to_encode(sequences):
    model = gpt2()
    before = copy.deepcopy(model)
    encode_model(model, sequences, types_of(model))
    for name, module in block_matrices(model).items():
        weight = weight_of(module)
        original = weight_of(block_matrices(before)[name])
        assert (weight - original).square().mean() < 0.3 * original.square().mean(), name


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({"a": "Q2_K", "b": "Q3_K", "c": "Q6_K", "d": "Q4_K", HEAD: "Q6_K"}, {"b": "Q3_K", "c": "Q6_K"}),
        ({"b": "Q3_K", "c": "Q6_K", HEAD: "Q2_K"}, {}),
        ({"a": "Q2_K", HEAD: "Q6_K"}, {}),
        ({}, {}),
    ],
)
def test_adapted_are_matrices_that_keep_zeros_beside_others_that_do_not(types, expected):
    assert to_adapt(types) == expected
