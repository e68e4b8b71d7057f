import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from pipeline.errors import CheckFailed
from pipeline.export import convert
from pipeline.gguf_file import GgufContents
from pipeline.gguf_names import as_stored, interleave, matrix_names, rows_as_stored, rows_as_trained, separate
from pipeline.matrices import block_matrices

GROUPED = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
QUERIES = "model.layers.0.self_attn.q_proj"
KEYS = "model.layers.0.self_attn.k_proj"
VALUES = "model.layers.0.self_attn.v_proj"


def test_every_block_matrix_of_a_gpt2_has_the_name_of_its_tensor_in_the_file(toy_gpt2, llama_cpp, tmp_path):
    convert(toy_gpt2, llama_cpp, "toy", tmp_path / "toy.gguf")
    config = AutoConfig.from_pretrained(toy_gpt2)
    with torch.device("meta"):
        names = matrix_names(config, block_matrices(AutoModelForCausalLM.from_config(config)))
    assert names["transformer.h.0.mlp.c_fc"] == "blk.0.ffn_up.weight"
    assert names["transformer.h.1.attn.c_attn"] == "blk.1.attn_qkv.weight"
    assert sorted(names.values()) == sorted(GgufContents(tmp_path / "toy.gguf").matrices)


def test_a_llamas_seven_matrices_have_the_names_of_llama_cpp():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128))
    names = matrix_names(model.config, block_matrices(model))
    assert len(set(names.values())) == 14
    assert {new.removeprefix("blk.1.") for old, new in names.items() if ".1." in old} == {
        f"{role}.weight" for role in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }


def test_a_matrix_that_llama_cpp_has_no_name_for_is_refused():
    with pytest.raises(CheckFailed, match=r"no name for transformer\.h\.0\.mlp\.extra of a gpt2 model"):
        matrix_names(GPT2Config(n_layer=1), ["transformer.h.0.mlp.extra"])


def test_a_conv1d_weight_is_stored_as_out_by_in_and_its_bias_as_it_is():
    weight = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(as_stored("transformer.h.0.mlp.c_fc.weight", weight, GPT2Config()), weight.T)
    assert torch.equal(as_stored("transformer.h.0.mlp.c_fc.bias", weight[0], GPT2Config()), weight[0])
    assert torch.equal(rows_as_stored("transformer.h.0.mlp.c_fc", weight, GPT2Config()), weight)


def test_rotary_rows_are_interleaved_within_each_head():
    """Two heads, four wide: row pairs (0, 2) and (1, 3) of each are one rotation."""
    rows = torch.arange(8.0)[:, None]
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_grouped_keys_are_interleaved_by_their_own_number_of_heads():
    rows = torch.arange(8.0)[:, None]
    assert torch.equal(as_stored(f"{KEYS}.weight", rows, GROUPED), interleave(rows, 2))
    assert torch.equal(as_stored(f"{QUERIES}.weight", rows, GROUPED), rows)  # four heads, two wide: one pair each
    assert torch.equal(as_stored(f"{VALUES}.weight", rows, GROUPED), rows)


@pytest.mark.parametrize("name", [QUERIES, KEYS, VALUES, f"{QUERIES}.weight", "model.layers.0.mlp.up_proj"])
def test_rows_in_the_files_order_and_back_are_the_same_rows(name):
    rows = torch.arange(48 * 5.0).reshape(48, 5)
    stored = rows_as_stored(name, rows, GROUPED)
    assert torch.equal(rows_as_trained(name, stored, GROUPED), rows)
    assert torch.equal(rows_as_stored(name, rows_as_trained(name, rows, GROUPED), GROUPED), rows)


def test_packed_bytes_move_as_the_rows_they_are_packed_from():
    rows = torch.arange(24 * 2.0).reshape(24, 2)
    packed = rows.numpy().view(np.uint8)  # (24, 8)
    moved = rows_as_stored(KEYS, packed, GROUPED)
    assert np.array_equal(np.ascontiguousarray(moved).view(np.float32), rows_as_stored(KEYS, rows, GROUPED).numpy())
    assert np.array_equal(rows_as_trained(KEYS, moved, GROUPED), packed)
    assert not np.array_equal(moved, packed)


def test_separating_is_not_interleaving_again():
    rows = torch.arange(12)
    assert not torch.equal(interleave(interleave(rows, 2), 2), rows)
    assert torch.equal(separate(interleave(rows, 2), 2), rows)
