import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.errors import CheckFailed
from pipeline.matrices import block_matrices, weight_of


def test_the_124m_gpt2_has_48_block_matrices_and_the_head_is_none_of_them():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    found = block_matrices(model)
    assert len(found) == 48
    assert not any("wte" in name or "lm_head" in name for name in found)


def test_a_llama_block_has_seven():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, hidden_size=64, intermediate_size=128))
    assert len(block_matrices(model)) == 21


def test_a_conv1d_weight_is_seen_as_out_by_in_and_written_through():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    module = block_matrices(model)["transformer.h.0.mlp.c_fc"]
    weight = weight_of(module)
    assert weight.shape == (32, 8) and module.weight.shape == (8, 32)
    weight[5, 3] = 7
    assert module.weight[3, 5] == 7


def test_a_model_without_blocks_is_an_error():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    model.config.n_layer = 5
    with pytest.raises(CheckFailed, match="no list of 5 blocks"):
        block_matrices(model)


def test_blocks_without_matrices_are_an_error(toy_gpt2):
    model = AutoModelForCausalLM.from_pretrained(toy_gpt2)
    for block in model.transformer.h:
        block.attn = block.mlp = torch.nn.Identity()
    with pytest.raises(CheckFailed, match="found 0 linear layers"):
        block_matrices(model)
