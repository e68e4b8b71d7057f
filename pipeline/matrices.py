"""The weight matrices of a model's blocks, always seen as (out, in).

GPT-2 keeps them in `Conv1D` as (in, out); nearly everything else in `nn.Linear` as (out, in). This module is
the one place that knows. Embeddings and the output head are outside the blocks and are never listed: code that
looks for `nn.Linear` in GPT-2 finds only the head, which is the embedding, and prunes that.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import CheckFailed


def block_matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Module name to module, for every linear layer inside the repeated blocks, in order.

    Raises `CheckFailed` when there is none, or when the blocks do not all hold the same number.
    """
    blocks_name, blocks = find_blocks(model)
    found = {
        f"{blocks_name}.{name}": module
        for name, module in blocks.named_modules()
        if isinstance(module, Conv1D | nn.Linear)
    }
    if not found or len(found) % len(blocks):
        raise CheckFailed(
            f"found {len(found)} linear layers in the {len(blocks)} blocks of {type(model).__name__}; needed the "
            "same number, at least one, in every block: this architecture is not supported"
        )
    return found


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of `num_hidden_layers` blocks (GPT-2: transformer.h, Llama: model.layers)."""
    layers = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return name, module
    raise CheckFailed(f"found no list of {layers} blocks in {type(model).__name__}: this architecture is not supported")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the head (GPT-2: ln_f, Llama: norm)."""
    body = model.base_model
    for name in ("ln_f", "norm"):
        if isinstance(module := getattr(body, name, None), nn.Module):
            return module
    raise CheckFailed(f"found no final norm in {type(body).__name__}: this architecture is not supported")


def weight_of(module: nn.Module) -> Tensor:
    """The weight as an (out, in) view: writing to it writes to the module."""
    weight = module.weight.data
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor")
    return weight.T if isinstance(module, Conv1D) else weight


def ids_of_embeddings(model: PreTrainedModel) -> set[int]:
    """`id` of the parameters of the token embedding and the output head, one where they are tied."""
    return {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
