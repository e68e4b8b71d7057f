import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline import activations
from pipeline.activations import HEAD, grouped, input_squares, walk
from pipeline.device import Precision
from pipeline.errors import CheckFailed
from pipeline.matrices import block_matrices, weight_of

SEQUENCES = [[5, 1, 2, 3, 4, 9, 8], [7, 7, 7], [1], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 2, 9, 30, 31, 17, 3]]


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=3, n_head=2)).eval()


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **shape)).eval()


@pytest.fixture(params=[gpt2, llama])
def model(request, monkeypatch):
    """With weights large enough that every block matters, in fp32 whatever the hardware has."""
    monkeypatch.setattr(activations, "arithmetic_of", lambda asked, device: Precision("fp32", "for exact sums"))
    model = request.param()
    for module in block_matrices(model).values():
        weight_of(module).mul_(10)
    return model


@torch.no_grad()
def inputs_by_hand(model, sequences):
    """Matrix to its inputs (tokens, in): the whole model on one sequence at a time."""
    found = {name: [] for name in (*block_matrices(model), HEAD)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0][0]))
        for name, module in (*block_matrices(model).items(), (HEAD, model.get_output_embeddings()))
    ]
    for ids in sequences:
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def grams_of(model, sequences):
    """Of an unchanged model."""
    return {name: gram for block in walk(model, sequences, "test") for name, (_, gram) in block.items()}


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_every_gram_matrix_is_the_sum_over_the_tokens_that_the_whole_model_shows(model):
    by_hand, found = inputs_by_hand(model, SEQUENCES), grams_of(model, SEQUENCES)
    assert list(found) == [*block_matrices(model), HEAD]
    for name, x in by_hand.items():
        assert close(found[name].total, x.T @ x), name
        assert found[name].total.dtype == torch.float32
        assert found[name].tokens == len(x) == sum(map(len, SEQUENCES))
        assert close(found[name].mean, x.T @ x / len(x))


@pytest.mark.parametrize("tokens", [1, 8, 22, 4096])
def test_padding_counts_for_nothing_however_the_sequences_are_batched(model, tokens, monkeypatch):
    monkeypatch.setattr(activations, "BATCH_TOKENS", tokens)
    by_hand = inputs_by_hand(model, SEQUENCES)
    grams, squares = grams_of(model, SEQUENCES), input_squares(model, SEQUENCES)
    for name, x in by_hand.items():
        assert close(grams[name].total, x.T @ x), name
        assert close(squares[name].sums, x.square().sum(0)), name
        assert grams[name].tokens == squares[name].tokens == len(x)


def test_the_squares_are_the_diagonals_of_the_gram_matrices(model):
    grams, squares = grams_of(model, SEQUENCES), input_squares(model, SEQUENCES)
    assert squares.keys() == grams.keys()
    for name, gram in grams.items():
        assert close(squares[name].sums, gram.total.diagonal()), name


def test_each_block_sees_what_the_changed_blocks_before_it_make(model):
    dense = grams_of(model, SEQUENCES)
    first = next(iter(walk(model, SEQUENCES, "test"))).keys()
    for block in walk(model, SEQUENCES, "test"):
        so_far = inputs_by_hand(model, SEQUENCES)  # the blocks before are changed, this one is not
        for name, (module, gram) in block.items():
            assert close(gram.total, so_far[name].T @ so_far[name]), name
            assert close(gram.total, dense[name].total) == (name in first), name
            if name != HEAD:
                weight_of(module)[:, ::2] = 0


def test_matrices_with_one_input_share_one_gram_matrix(model):
    shared = {
        "gpt2": [],
        "llama": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
    }[model.config.model_type]
    for block in walk(model, SEQUENCES, "test"):
        if HEAD in block:
            continue
        by_end = {name.split(".", 3)[-1]: gram.total.data_ptr() for name, (_, gram) in block.items()}
        for names in shared:
            assert len({by_end[name] for name in names}) == 1
        assert len(set(by_end.values())) == len(by_end) - sum(len(names) - 1 for names in shared)


def test_the_walk_leaves_no_hook_and_no_gradient_behind(model):
    for block in walk(model, SEQUENCES, "test"):
        assert not any(gram.total.requires_grad for _, gram in block.values())
    input_squares(model, SEQUENCES)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_walk_that_is_given_up_leaves_no_hook_behind(model):
    next(walk(model, SEQUENCES, "test"))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bf16_moves_the_sums_little(model, monkeypatch):
    exact = grams_of(model, SEQUENCES)
    monkeypatch.setattr(activations, "arithmetic_of", lambda asked, device: Precision("bf16", "as on a GPU"))
    for name, gram in grams_of(model, SEQUENCES).items():
        assert gram.total.dtype == torch.float32
        assert (gram.total - exact[name].total).norm() < 0.05 * exact[name].total.norm(), name


def test_an_activation_that_is_not_finite_names_the_first_matrix_that_gets_it(model):
    norm = {"gpt2": "transformer.h.1.ln_2.weight", "llama": "model.layers.1.post_attention_layernorm.weight"}
    hit = {"gpt2": "transformer.h.1.mlp.c_fc", "llama": "model.layers.1.mlp.gate_proj"}
    kind = model.config.model_type
    model.get_parameter(norm[kind]).data[3] = float("inf")
    with pytest.raises(CheckFailed, match=f"inputs of {hit[kind]} are not finite"):
        grams_of(model, SEQUENCES)


def test_groups_hold_every_sequence_once_and_padding_counts_against_the_bound():
    sequences = [[0] * length for length in (5, 3, 9, 1, 3, 20, 2, 2, 4)]
    groups = grouped(sequences, 12)
    assert sorted(map(len, sequences)) == sorted(len(ids) for group in groups for ids in group)
    for group in groups:
        assert len(group) * max(map(len, group)) <= 12 or len(group) == 1
    assert [len(ids) for ids in groups[0]] == [20]
    assert len(groups) < len(sequences)
