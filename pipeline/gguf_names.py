"""Where llama.cpp's GGUF keeps a checkpoint's tensors: under which name, and in which order of rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.errors import CheckFailed

Rows = TypeVar("Rows", Tensor, np.ndarray)

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 keeps these as (in, out)


def name_map(config: PreTrainedConfig) -> TensorNameMap:
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == config.model_type)
    return get_tensor_name_map(architecture, config.num_hidden_layers)


def gguf_name(names: TensorNameMap, hf_name: str) -> str | None:
    name: str | None = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
    return name


def matrix_names(config: PreTrainedConfig, hf_module_names: Iterable[str]) -> dict[str, str]:
    """Module (transformer.h.0.mlp.c_fc) to the tensor of its weight in the file (blk.0.ffn_up.weight).

    Raises `CheckFailed` for a module that llama.cpp has no name for.
    """
    names, found = name_map(config), {}
    for module in hf_module_names:
        name = gguf_name(names, f"{module}.weight")
        if name is None:
            raise CheckFailed(
                f"llama.cpp has no name for {module} of a {config.model_type} model; needed is one for every matrix "
                "of the blocks: this architecture is not supported"
            )
        found[module] = name
    return found


def as_stored(hf_name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """A checkpoint's tensor in llama.cpp's layout: matrices as (out, in), rows in the file's order."""
    return rows_as_stored(hf_name, tensor.T if is_transposed(hf_name, config) else tensor, config)


def is_transposed(hf_name: str, config: PreTrainedConfig) -> bool:
    """Whether the checkpoint keeps this tensor as (in, out)."""
    return bool(config.model_type == "gpt2" and hf_name.endswith(CONV1D))


def rows_as_stored(hf_name: str, rows: Rows, config: PreTrainedConfig) -> Rows:
    """(out, …) in the file's order: Llama's queries and keys have the rotary halves of each head interleaved.

    `hf_name` is that of a module or of its weight or bias; `rows` may be packed bytes, or anything else that has
    one entry a row.
    """
    heads = rotary_heads(hf_name, config)
    return interleave(rows, heads) if heads else rows


def rows_as_trained(hf_name: str, rows: Rows, config: PreTrainedConfig) -> Rows:
    """(out, …) from the file back in the checkpoint's order: the inverse of `rows_as_stored`."""
    heads = rotary_heads(hf_name, config)
    return separate(rows, heads) if heads else rows


def rotary_heads(hf_name: str, config: PreTrainedConfig) -> int:
    """How many heads a tensor's rows divide into, if llama.cpp reorders them; 0 if it does not."""
    if config.model_type == "llama" and ".self_attn." in hf_name:
        if "q_proj" in hf_name:
            return int(config.num_attention_heads)
        if "k_proj" in hf_name:
            return int(config.num_key_value_heads)
    return 0


def interleave(rows: Rows, heads: int) -> Rows:
    """Rows of each head from (first half, second half), as transformers rotates, to pairs, as llama.cpp does."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # (heads, 2, width / 2, …)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def separate(rows: Rows, heads: int) -> Rows:
    """The inverse of `interleave`."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # (heads, width / 2, 2, …)
    return pairs.swapaxes(1, 2).reshape(rows.shape)
