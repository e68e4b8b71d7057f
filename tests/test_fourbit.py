import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import CheckFailed
from pipeline.fourbit import dequantized, load_nf4, nf4_facts, packed_matrices
from pipeline.matrices import block_matrices, weight_of


def test_all_block_matrices_of_gpt2_are_packed_and_nothing_else(toy_gpt2):
    model = load_nf4(toy_gpt2, "cpu")
    facts = nf4_facts(model)
    dense = AutoModelForCausalLM.from_pretrained(toy_gpt2)
    assert set(packed_matrices(model)) == set(block_matrices(dense))
    assert facts["matrices"] == 8
    assert facts["parameters"] == dense.num_parameters()
    assert model.transformer.wte.weight.dtype == torch.float32
    packed = sum(module.weight.numel() for module in block_matrices(dense).values())
    saved = facts["fp32_bytes"] - facts["memory_bytes"]
    assert saved == pytest.approx(packed * 3.5, rel=0.02)  # 32 bits become 4


def test_a_layer_computes_in_fp32_with_the_weight_it_dequantizes_to(toy_gpt2):
    dense = AutoModelForCausalLM.from_pretrained(toy_gpt2, dtype=torch.float32)
    for name, module in packed_matrices(load_nf4(toy_gpt2, "cpu")).items():
        weight = dequantized(module)  # (out, in)
        original = weight_of(dense.get_submodule(name))
        assert (weight - original).abs().max() < 0.2 * original.abs().max()
        x = torch.randn(3, weight.shape[1])
        with torch.no_grad():
            assert torch.allclose(module(x), x @ weight.T + module.bias, atol=1e-5)


def test_a_model_with_nothing_packed_is_an_error(toy_gpt2, monkeypatch):
    monkeypatch.setattr("pipeline.fourbit.packed_matrices", lambda model: {})
    with pytest.raises(CheckFailed, match="packed no matrix"):
        load_nf4(toy_gpt2, "cpu")


def test_a_llama_is_packed_too(wide_llama):
    assert nf4_facts(load_nf4(wide_llama, "cpu"))["matrices"] == 2 * 7
