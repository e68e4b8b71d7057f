"""What each type of each role of tensors costs: how far predictions move when that role alone is rounded to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from gguf.gguf_reader import ReaderTensor
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline import llama_cpp
from pipeline.activations import grouped
from pipeline.collate import collate
from pipeline.distill import outputs
from pipeline.errors import CheckFailed
from pipeline.forecast import Choice
from pipeline.gguf_reader import TensorReader
from pipeline.gguf_weights import read_weight, stored_parameters
from pipeline.kquants import KTYPES
from pipeline.llama_cpp import LlamaCpp
from pipeline.progress import bar

FILE_TYPE = "Q8_0"  # of the measured files: any would do, since each measured tensor's type is given
FILE_NAME = "measured.gguf"
BATCH_TOKENS = 512  # bounds the memory that logits take: 100 MB for GPT-2's vocabulary

Sequences = Sequence[Sequence[int]]
Stored = tuple[str, nn.Parameter, ReaderTensor]


@torch.no_grad()
def sensitivity(
    model: PreTrainedModel,
    tuned: PreTrainedModel,
    f16: Path,
    sequences: Sequences,
    roles: Mapping[str, Mapping[str, Sequence[str]]],
    choice: Choice,
    encode: Callable[[Path, str], object],
    tools: LlamaCpp,
    out: Path,
) -> dict[str, dict[str, float]]:
    """What each type adds to the KL of `model` from `tuned` on `sequences`, in nats a token, for each role that may get
    it; less than nothing where rounding from the weights of `tuned` comes nearer to it than `model` is.

    `roles`: role to type to the tensors that get it. `model` is the checkpoint behind `f16`, and is left as it is.
    `out` has the importance matrix of `choice`, and gets one measured file at a time: llama-quantize's, over which
    `encode(path, type)` writes ours of the types that it knows. Raises `CheckFailed` for a KL that is not finite.
    """
    expected = list(predictions(tuned, sequences))
    before = divergence(expected, predictions(model, sequences))
    found: dict[str, dict[str, float]] = {role: {} for role in roles}
    kinds = list(dict.fromkeys(kind for types in roles.values() for kind in types))
    for kind in bar(kinds, "quantize: budget"):
        own = {role: types[kind] for role, types in roles.items() if kind in types}
        options = Choice(choice.importance, {tensor: kind for tensors in own.values() for tensor in tensors})
        path = out / FILE_NAME
        llama_cpp.quantize(tools, f16, path, FILE_TYPE, options.arguments())
        if kind in KTYPES:
            encode(path, kind)
        stored = {weight[2].name: weight for weight in stored_parameters(model, TensorReader(path))}
        for role, tensors in own.items():
            with rounded(model, [stored[tensor] for tensor in tensors]):
                kl = divergence(expected, predictions(model, sequences)) - before
            found[role][kind] = finite(kl, role, kind)
        path.unlink()
    return found


@contextmanager
def rounded(model: PreTrainedModel, weights: Sequence[Stored]) -> Iterator[None]:
    """`model` with these weights of a file, and afterwards with its own again."""
    before = [parameter.detach().clone() for _, parameter, _ in weights]
    try:
        for name, parameter, stored in weights:
            parameter.copy_(read_weight(name, stored, model.config))
        yield
    finally:
        for (_, parameter, _), own in zip(weights, before, strict=True):
            parameter.copy_(own)


@torch.no_grad()
def predictions(model: PreTrainedModel, sequences: Sequences) -> Iterator[Tensor]:
    """Log-probabilities (N, V) float32 of the N predicted tokens of each batch. Not in bf16: Q8_0 moves them less."""
    for batch in grouped(sequences, BATCH_TOKENS):
        inputs = collate([{"input_ids": ids} for ids in batch])
        ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
        kept = mask[:, :-1].bool() & mask[:, 1:].bool()
        yield outputs(model, ids, mask, kept, features=False).logits.float().log_softmax(-1)


def divergence(expected: Sequence[Tensor], found: Iterator[Tensor]) -> float:
    """KL(expected || found) in nats a token, over all batches."""
    pairs = zip(expected, found, strict=True)
    total = sum(float((p.exp() * (p - q)).sum(-1).double().sum()) for p, q in pairs)
    return max(0.0, total / sum(len(p) for p in expected))  # rounding of float32 can make nothing less than nothing


def finite(kl: float, role: str, kind: str) -> float:
    if not math.isfinite(kl):
        raise CheckFailed(f"{role} stored as {kind} moves the predictions by {kl} nats a token; train the model again")
    return kl
