"""The block matrices of a model in their k-quant types, block by block on what the quantized blocks before make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.activations import HEAD, Gram, walk
from pipeline.gptq import encode
from pipeline.hessian import damped, inverse_factor
from pipeline.kquants import BLOCK, KTYPES, KQuant
from pipeline.matrices import block_matrices, weight_of
from pipeline.polish import polish


def encode_model(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    types: Mapping[str, str],
    *,
    others: Mapping[str, Tensor] | None = None,
    keep_zeros: bool = False,
    after_block: Callable[[], None] = lambda: None,
) -> dict[str, KQuant]:
    """Encodes the matrices named in `types` (module name, or `HEAD`, to k-quant), and leaves `model` with them.

    `others` are matrices (out, in) of other types as the file holds them; they are put into the model, so that the
    blocks after them are fitted to what they will get. Rows that are no multiple of 256 are filled with zeros, which
    only a bench may do: GGUF has no such rows. Zeros of block matrices count as pruned.
    """
    found = {}
    for block in walk(model, sequences, "quantize"):
        for name, (module, gram) in block.items():
            if name in types:
                found[name] = encode_module(module, gram, types[name], pruned=name != HEAD, keep_zeros=keep_zeros)
            elif others and name in others:
                weight_of(module).copy_(others[name])
        after_block()
    return found


@torch.no_grad()
def take_unpruned(
    model: PreTrainedModel, load_dense: Callable[[], PreTrainedModel], types: Mapping[str, str], keep_zeros: bool
) -> list[str]:
    """Gives `model` those matrices of the dense model whose types would not keep a pruned weight at zero: their names.
    Where there are none, that model is not loaded.

    Rounding gives it a value anyway; so that may as well be the nearest to the one it had. Measured on a small trained
    GPT-2, both fitted to the same 6,144 tokens: a KL of 0.0052 nats a token from the dense model, rounded from pruned
    weights 0.0072, and 0.0032 before rounding.
    """
    modules = block_matrices(model)
    taken = [name for name in modules if name in types and loses_zeros(types[name], keep_zeros)]
    others = block_matrices(load_dense()) if taken else {}
    for name in taken:
        weight_of(modules[name]).copy_(weight_of(others[name]))
    return taken


def to_adapt(types: Mapping[str, str]) -> dict[str, str]:
    """Those block matrices of `types` (name to tensor type) that are worth training and rounding after the others.

    Our encoder knows their types, and they keep their zeros beside others that do not: those are rounded from weights
    that these were not fitted to.
    """
    ours = {name: kind for name, kind in types.items() if name != HEAD and kind in KTYPES}
    found = {name: kind for name, kind in ours.items() if not loses_zeros(kind)}
    return found if len(found) < len(ours) else {}


@torch.no_grad()
def encode_module(module: nn.Module, gram: Gram, kind: str, *, pruned: bool, keep_zeros: bool) -> KQuant:
    weight = weight_of(module)
    columns = weight.shape[1]
    wide = padded(weight.float(), whole_blocks(columns))
    wide_gram = Gram(square(gram.total, wide.shape[1]), gram.tokens)
    kept = kept_at_zero(wide, kind, keep_zeros) if pruned else None
    factor = inverse_factor(wide_gram)
    quantized = encode(wide, factor, kind, kept=kept, keep_zeros=keep_zeros and pruned)
    frozen = None if kept is None else ~kept
    quantized = polish(quantized, wide, damped(wide_gram), frozen)
    weight.copy_(quantized.dequantize()[:, :columns])
    return quantized


def kept_at_zero(weight: Tensor, kind: str, keep_zeros: bool) -> Tensor | None:
    """Which weights (R, C) were not pruned, where the pruned ones have to be zero in the file too.

    None for a type whose grid has no zero, unless one was asked for: there they are better where they cost least.
    """
    return None if loses_zeros(kind, keep_zeros) else weight != 0


def loses_zeros(kind: str, keep_zeros: bool = False) -> bool:
    return KTYPES[kind].max_min > 0 and not keep_zeros


def padded(values: Tensor, columns: int) -> Tensor:
    missing = columns - values.shape[1]
    return nn.functional.pad(values, (0, missing)) if missing else values


def whole_blocks(columns: int) -> int:
    return -(-columns // BLOCK) * BLOCK


def square(gram: Tensor, size: int) -> Tensor:
    missing = size - len(gram)
    return nn.functional.pad(gram, (0, missing, 0, missing)) if missing else gram
