"""What the block matrices of a model see: the model run block by block over calibration text.

Each block runs on what the blocks before it make after they were changed, as in SparseGPT (arXiv:2301.00774,
section 3): otherwise every block would be fitted to inputs that it never gets in the compressed model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.collate import collate
from pipeline.device import arithmetic_of
from pipeline.errors import CheckFailed
from pipeline.matrices import block_matrices, final_norm, find_blocks
from pipeline.progress import bar

HEAD = "head"  # the output head among the names of block matrices; GPT-2's is the token embedding
BATCH_TOKENS = 4096  # run through a block at once; bounds memory, changes no result


@dataclass(frozen=True)
class Gram:
    """Second moments of a matrix's inputs over all calibration tokens: its Hessian up to a factor of two."""

    total: Tensor  # (in, in) float32, the sum of x xᵀ
    tokens: int

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens


@dataclass(frozen=True)
class Squares:
    """The diagonal of a `Gram`, all that an importance matrix holds."""

    sums: Tensor  # (in,) float32
    tokens: int


@dataclass
class Batch:
    hidden: Tensor  # (B, T, C), what the next block gets
    kept: Tensor  # (B, T) boolean: no padding
    kwargs: dict[str, Any]  # what else the model hands to every block: mask, positions


def walk(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], what: str
) -> Iterator[dict[str, tuple[nn.Module, Gram]]]:
    """For each block in order, its matrices by name, each with the Gram matrix of its inputs.

    What the consumer does to the weights before it asks for the next block is what the next block sees.
    Raises `CheckFailed` for inputs that are not finite.
    """
    batches = first_inputs(model, sequences)
    prefix, blocks = find_blocks(model)
    matrices = block_matrices(model)
    for number, block in enumerate(bar(blocks, what, len(blocks))):
        own = {name: module for name, module in matrices.items() if name.startswith(f"{prefix}.{number}.")}
        grams = grams_of(block, own, batches)
        yield {name: (module, grams[name]) for name, module in own.items()}
        for batch in batches:
            batch.hidden = run(block, batch)
    head = model.get_output_embeddings()
    norm = final_norm(model)
    with torch.no_grad():
        inputs = [norm(batch.hidden)[batch.kept].float() for batch in batches]
    gram = Gram(sum((x.T @ x for x in inputs), torch.zeros(())), sum(len(x) for x in inputs))
    yield {HEAD: (head, finite(HEAD, gram))}


@torch.no_grad()
def input_squares(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> dict[str, Squares]:
    """Block matrix (and `HEAD`) to the squared inputs of its columns, summed, in one pass through the whole model."""
    sums: dict[str, Tensor] = {}
    kept = torch.zeros(0)

    def add(name: str, x: Tensor) -> None:
        rows = x[kept].float()
        sums[name] = sums.get(name, torch.zeros((), device=x.device)) + rows.square().sum(0)

    tokens = 0
    with hooks(block_matrices(model), add):
        for group in bar(grouped(sequences, BATCH_TOKENS), "importance"):
            inputs = collate([{"input_ids": ids} for ids in group])
            kept = inputs["attention_mask"].bool().to(model.device)
            tokens += int(kept.sum())
            ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
            # not the whole model: nobody asked for logits, which take 800 MB for 4,096 tokens
            with fast_arithmetic(model.device):
                found = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            add(HEAD, found.last_hidden_state)
    return {name: Squares(total, tokens) for name, total in sums.items()}


@contextmanager
def hooks(modules: dict[str, nn.Module], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`add(name, input)` whenever a module runs."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Caught(Exception):
    """Ends the forward pass at the first block."""


def first_inputs(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Batch]:
    """What the first block gets for each batch, with everything the model passes to its blocks."""
    found: list[Batch] = []
    kept = torch.zeros(0)

    def catch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name != "past_key_values"}
        hidden = args[0] if args else kwargs.pop("hidden_states")
        found.append(Batch(hidden.detach(), kept, kwargs))
        raise Caught

    first = find_blocks(model)[1][0]
    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for group in grouped(sequences, BATCH_TOKENS):
            inputs = collate([{"input_ids": ids} for ids in group])
            kept = inputs["attention_mask"].bool().to(model.device)
            try:
                with torch.no_grad(), fast_arithmetic(model.device):
                    model(
                        input_ids=inputs["input_ids"].to(model.device),
                        attention_mask=inputs["attention_mask"].to(model.device),
                        use_cache=False,
                    )
            except Caught:
                continue
    finally:
        handle.remove()
    return found


def grouped(sequences: Sequence[Sequence[int]], batch_tokens: int) -> list[list[Sequence[int]]]:
    """Sequences of similar length together, at most `batch_tokens` a group, padding included; a longer one alone."""
    groups: list[list[Sequence[int]]] = []
    for ids in sorted(sequences, key=len, reverse=True):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0]) <= batch_tokens:
            groups[-1].append(ids)
        else:
            groups.append([ids])
    return groups


@torch.no_grad()
def run(block: nn.Module, batch: Batch) -> Tensor:
    with fast_arithmetic(batch.hidden.device):
        output = block(batch.hidden, **batch.kwargs)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def fast_arithmetic(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where the hardware has it. The statistics are sums over thousands of tokens: its rounding averages out."""
    return torch.autocast(device.type, torch.bfloat16, enabled=arithmetic_of("auto", device.type).name == "bf16")


def grams_of(block: nn.Module, matrices: dict[str, nn.Module], batches: Sequence[Batch]) -> dict[str, Gram]:
    """The Gram matrix of each matrix's inputs. Matrices that share their input share the sum."""
    sums: dict[str, Tensor] = {}
    shared: dict[str, str] = {}  # name to the first matrix with the same input
    seen: list[tuple[Tensor, str]] = []
    kept = torch.zeros(0)

    def add(name: str, x: Tensor) -> None:
        first = next((other for tensor, other in seen if tensor is x), None)
        if first is not None:
            shared[name] = first
            return
        seen.append((x, name))
        rows = x[kept].float()
        with torch.autocast(x.device.type, enabled=False):  # the block's own: with it the sums would be in bf16 too
            sums[name] = sums.get(name, torch.zeros((), device=x.device)) + rows.T @ rows

    tokens = 0
    with hooks(matrices, add):
        for batch in batches:
            seen.clear()
            kept = batch.kept
            tokens += int(kept.sum())
            run(block, batch)
    return {name: finite(name, Gram(sums[shared.get(name, name)], tokens)) for name in matrices}


def finite(name: str, gram: Gram) -> Gram:
    if not torch.isfinite(gram.total).all():
        raise CheckFailed(
            f"the inputs of {name} are not finite; a weight, norm or bias of the model before it is broken, train it "
            "again"
        )
    return gram
