"""Training a damaged model to predict what the whole one predicts: distillation (Hinton et al., arXiv:1503.02531).

The loss is KL(teacher || student) over the whole vocabulary, in nats a token. The hold-out is never seen: the
validation split that training stops by is part of the calibration text.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel

from pipeline.activations import grouped
from pipeline.artifacts import Facts
from pipeline.collate import collate
from pipeline.errors import CheckFailed
from pipeline.progress import bar

log = logging.getLogger(__name__)

WARMUP = 0.1  # share of the steps over which the learning rate rises; then it falls to zero along a cosine
VALIDATIONS = 8  # in a whole run
GRADIENT_NORM = 1.0
# Of norms and biases, beside matrices: every token moves each of them, so they bear larger steps. Measured on SmolLM2's
# recovery, matrices at 1e-4, 30 steps: norms at 2e-3 give a KL of 0.432 nats a token, at 1e-4 0.441. With matrices at
# 2e-4, norms at 4e-3 were too fast.
VECTOR_RATE = 10.0

Sequences = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Recipe:
    steps: int
    batch_tokens: int
    learning_rate: float
    patience: int
    precision: str
    seed: int
    features: float = 0.0


@dataclass(frozen=True)
class Group:
    """Parameters that are trained, with what their learning rate is times the recipe's."""

    parameters: list[nn.Parameter]
    rate: float = 1.0


def grouped_by_rank(parameters: Iterable[nn.Parameter]) -> list[Group]:
    """Matrices and vectors, each with its rate."""
    found = list(parameters)
    return [Group([p for p in found if p.ndim > 1]), Group([p for p in found if p.ndim == 1], VECTOR_RATE)]


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train: Sequences,
    validation: Sequences,
    groups: Sequence[Group],
    recipe: Recipe,
    *,
    what: str,
    after_step: Callable[[], None] = lambda: None,
) -> Facts:
    """Trains `groups` of `student` in place and leaves them as they were at the lowest validation loss.

    Raises `CheckFailed` when the loss is not finite.
    """
    trained = [parameter for group in groups for parameter in group.parameters]
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": group.parameters, "lr": recipe.learning_rate * group.rate} for group in groups],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, recipe.steps))
    started = time.monotonic()
    best = Best(trained, validate(student, teacher, validation, recipe))
    curve = [point(0, started, best.loss)]
    losses: list[float] = []
    every = max(1, math.ceil(recipe.steps / VALIDATIONS))
    batches = endless(train, recipe.batch_tokens, recipe.seed)
    tokens = step = 0
    for step in bar(range(1, recipe.steps + 1), what, recipe.steps):
        batch = next(batches)
        loss, counted = divergence(student, teacher, batch, recipe)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        after_step()
        tokens += counted
        losses.append(loss.item())
        require_finite(losses[-1], what, step, recipe)
        if step % every == 0 or step == recipe.steps:
            found = validate(student, teacher, validation, recipe)
            curve.append(point(step, started, found))
            log.info("%s: step %d of %d, validation KL %.4f nats a token", what, step, recipe.steps, found)
            if best.take(found) >= recipe.patience:
                break
    best.restore()
    return {
        "steps": step,
        "planned_steps": recipe.steps,
        "tokens": tokens,
        "precision": recipe.precision,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "validation_tokens": sum(len(ids) - 1 for ids in validation),
        "validation_kl_before": curve[0]["validation_kl"],
        "validation_kl": best.loss,
        "best_step": curve[best.at]["step"],
        "curve": curve,
        "loss_history": losses,
    }


class Best:
    """The trained parameters at the lowest validation loss so far."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: float) -> None:
        self.parameters, self.loss, self.at, self.seen = parameters, loss, 0, 0
        self.values = [parameter.detach().clone() for parameter in parameters]

    def take(self, loss: float) -> int:
        """How many validations ago the lowest loss was."""
        self.seen += 1
        if loss < self.loss:
            self.loss, self.at = loss, self.seen
            for value, parameter in zip(self.values, self.parameters, strict=True):
                value.copy_(parameter.detach())
        return self.seen - self.at

    def restore(self) -> None:
        with torch.no_grad():
            for value, parameter in zip(self.values, self.parameters, strict=True):
                parameter.copy_(value)


def point(step: int, started: float, loss: float) -> Facts:
    return {"step": step, "seconds": time.monotonic() - started, "validation_kl": loss}


def rate_at(step: int, steps: int) -> float:
    rising = max(1, round(WARMUP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def endless(sequences: Sequences, batch_tokens: int, seed: int) -> Iterator[Sequences]:
    """Batches of sequences of similar length, in another order each time round."""
    groups = grouped(sequences, batch_tokens)
    generator = random.Random(seed)
    while True:
        yield from generator.sample(groups, len(groups))


def divergence(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Sequences, recipe: Recipe
) -> tuple[Tensor, int]:
    """Mean loss over the predicted tokens of a batch, and how many they are."""
    inputs = collate([{"input_ids": ids} for ids in batch])
    ids, mask = inputs["input_ids"].to(student.device), inputs["attention_mask"].to(student.device)
    kept = mask[:, :-1].bool() & mask[:, 1:].bool()  # the last token of a sequence predicts nothing
    with arithmetic(student, recipe.precision):
        with torch.no_grad():
            theirs = outputs(teacher, ids, mask, kept, recipe.features > 0)
        ours = outputs(student, ids, mask, kept, recipe.features > 0)
    target = theirs.logits.float().softmax(-1)  # (N, V)
    entropy = -(target * theirs.logits.float().log_softmax(-1)).sum(-1).mean()
    loss = cross_entropy(ours.logits.float(), target) - entropy
    if recipe.features:
        pairs = zip(ours.features, theirs.features, strict=True)
        loss = loss + recipe.features * sum(
            (mse_loss(a.float(), b.float()) / b.float().square().mean() for a, b in pairs), torch.zeros(())
        ) / len(ours.features)
    return loss, int(kept.sum())


@dataclass(frozen=True)
class Outputs:
    logits: Tensor  # (N, V) for the N predicted tokens alone
    features: list[Tensor]  # each block's output, (N, C)


def outputs(model: PreTrainedModel, ids: Tensor, mask: Tensor, kept: Tensor, features: bool) -> Outputs:
    found = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=features)
    hidden = found.last_hidden_state[:, :-1][kept]
    states = [state[:, :-1][kept] for state in found.hidden_states[1:]] if features else []
    return Outputs(model.get_output_embeddings()(hidden), states)


def arithmetic(model: PreTrainedModel, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def validate(student: PreTrainedModel, teacher: PreTrainedModel, sequences: Sequences, recipe: Recipe) -> float:
    """KL in nats a token over all of `sequences`."""
    total = 0.0
    tokens = 0
    for batch in grouped(sequences, recipe.batch_tokens):
        loss, counted = divergence(student, teacher, batch, Recipe(**{**vars(recipe), "features": 0.0}))
        total += loss.item() * counted
        tokens += counted
    return total / tokens


def require_finite(loss: float, what: str, step: int, recipe: Recipe) -> None:
    if not math.isfinite(loss):
        raise CheckFailed(
            f"{what}: the loss is {loss} at step {step} of {recipe.steps}; lower {what}.learning_rate (now "
            f"{recipe.learning_rate:g})"
        )
