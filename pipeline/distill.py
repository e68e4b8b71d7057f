"""Training a damaged model to predict what the whole one predicts: distillation (Hinton et al., arXiv:1503.02531).

The loss is KL(teacher || student) over the whole vocabulary, in nats a token. The hold-out is never seen: the
validation split that training stops by is part of the calibration text.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import Optimizer
from transformers import PreTrainedModel

from pipeline.activations import grouped
from pipeline.artifacts import Facts
from pipeline.checkpoints import Checkpoints
from pipeline.collate import collate
from pipeline.config.shrinking import DistillConfig
from pipeline.course import Best, Course, resumed, write
from pipeline.device import arithmetic_of
from pipeline.errors import CheckFailed
from pipeline.progress import bar

log = logging.getLogger(__name__)

WARMUP = 0.1  # share of the steps over which the learning rate rises; then it falls to zero along a cosine
VALIDATIONS = 8  # in a whole run
GRADIENT_NORM = 1.0

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

    @classmethod
    def of(cls, cfg: DistillConfig, device: str, seed: int, features: float = 0.0) -> Recipe:
        precision = arithmetic_of(cfg.precision, device).name
        return cls(cfg.steps, cfg.batch_tokens, cfg.learning_rate, cfg.patience, precision, seed, features)


@dataclass(frozen=True)
class Group:
    """Parameters that are trained, with what their learning rate is times the recipe's."""

    parameters: list[nn.Parameter]
    rate: float = 1.0


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
    checkpoints: Checkpoints | None = None,
    keep_end: bool = False,
) -> Facts:
    """Trains `groups` of `student` in place and leaves them as they were at the lowest validation loss.

    Goes on from the newest of `checkpoints`, on a CPU to the same bits; `student` comes as it was before any training.
    `keep_end`: there is one of the end too, for a caller whose work after it takes long. Raises `CheckFailed` when the
    loss is not finite.
    """
    trained = [parameter for group in groups for parameter in group.parameters]
    student.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = optimizer_of(groups, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, recipe.steps))
    best = Best(trained, math.inf)
    course = resumed(checkpoints, best, optimizer, schedule, what)
    if course is None:
        course, best.loss = Course(), validate(student, teacher, validation, recipe)
    started, before = time.monotonic() - course.seconds, course.step
    course.curve = course.curve or [point(0, started, best.loss)]
    every = max(1, math.ceil(recipe.steps / VALIDATIONS))
    batches = islice(endless(train, recipe.batch_tokens, recipe.seed), before, None)

    def save(checkpoints: Checkpoints) -> None:
        course.seconds = time.monotonic() - started
        checkpoints.save(course.step, lambda folder: write(folder, course, best, optimizer, schedule))

    last = before if course.ended else recipe.steps
    for step in bar(range(before + 1, last + 1), what, last - before):
        loss, counted = divergence(student, teacher, next(batches), recipe)
        descend(loss, trained, optimizer)
        schedule.step()
        after_step()
        course.step, course.tokens = step, course.tokens + counted
        course.losses.append(loss.item())
        require_finite(course.losses[-1], what, step, recipe)
        if step % every == 0 or step == recipe.steps:
            kl = validate(student, teacher, validation, recipe)
            course.curve.append(point(step, started, kl))
            log.info("%s: step %d of %d, validation KL %.4f nats a token", what, step, recipe.steps, kl)
            if best.take(kl) >= recipe.patience:
                break
        if checkpoints and step < recipe.steps and checkpoints.due(step):
            save(checkpoints)
    if keep_end and checkpoints and checkpoints.wanted and not course.ended:
        course.ended = True
        save(checkpoints)
    best.restore()
    return facts_of(course, best, recipe, validation) | {"resumed": before}  # step of its checkpoint; 0: from the start


def optimizer_of(groups: Sequence[Group], recipe: Recipe) -> Optimizer:
    return torch.optim.AdamW(
        [{"params": group.parameters, "lr": recipe.learning_rate * group.rate} for group in groups],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )


def descend(loss: Tensor, trained: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
    """One step of the optimizer, with the gradient clipped."""
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def facts_of(course: Course, best: Best, recipe: Recipe, validation: Sequences) -> Facts:
    return {
        "steps": course.step,
        "planned_steps": recipe.steps,
        "tokens": course.tokens,
        "precision": recipe.precision,
        "trained_parameters": sum(parameter.numel() for parameter in best.parameters),
        "validation_tokens": sum(len(ids) - 1 for ids in validation),
        "validation_kl_before": course.curve[0]["validation_kl"],
        "validation_kl": best.loss,
        "best_step": course.curve[best.at]["step"],
        "curve": course.curve,
        "loss_history": course.losses,
    }


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
