"""Pruned model to recovered model: the weights that pruning left are trained, those it zeroed stay zero."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from pipeline.artifacts import Calibration, Checkpoint, Facts
from pipeline.calibrate import load_calibration
from pipeline.checkpoints import Checkpoints
from pipeline.config import RecoverConfig
from pipeline.distill import Group, Recipe, distill
from pipeline.errors import CheckFailed
from pipeline.loading import load_fp32
from pipeline.matrices import block_matrices, ids_of_embeddings, weight_of

log = logging.getLogger(__name__)


def recover(
    pruned: Checkpoint,
    tuned: Checkpoint,
    calibration: Calibration,
    cfg: RecoverConfig,
    *,
    device: str,
    seed: int,
    out: Path,
    checkpoints: Checkpoints | None = None,
) -> Checkpoint:
    """`pruned` trained to predict what `tuned` predicts on the calibration text; written to `out`.

    The blocks, norms and positions learn; token embeddings and head stay. Every zero of `pruned` is still zero:
    `CheckFailed` if not, or if the loss is not finite.
    """
    student = load_fp32(pruned, device)
    before = zero_counts(student)
    facts: Facts = {"steps": 0, "reason": "recover.steps is 0"}
    if cfg.steps and any(before.values()):
        train, validation = (load_calibration(calibration, split) for split in ("train", "validation"))
        recipe = Recipe.of(cfg, device, seed, cfg.features)
        facts = recover_model(student, load_fp32(tuned, device), train, validation, recipe, checkpoints)
        require_zeros(before, zero_counts(student))
        log.info(
            "recover: validation KL %.4f to %.4f nats a token", facts["validation_kl_before"], facts["validation_kl"]
        )
    elif cfg.steps:
        facts = {"steps": 0, "reason": "nothing was pruned"}
    student.cpu().save_pretrained(out)
    tuned.copy_tokenizer(out)
    return Checkpoint.of(out, facts | {"zeros": share_of_zeros(student)})


def recover_model(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train: Sequence[Sequence[int]],
    validation: Sequence[Sequence[int]],
    recipe: Recipe,
    checkpoints: Checkpoints | None = None,
    *,
    what: str = "recover",
    keep_end: bool = False,
) -> Facts:
    """Trains `student` in place with the mask of its zeros fixed. Embeddings, head, and what wants no gradient stay.

    The other parameters are as in `distill`.
    """
    modules = [module for module in block_matrices(student).values() if module.weight.requires_grad]
    masked = [(weight, weight != 0) for weight in map(weight_of, modules)]
    fixed = ids_of_embeddings(student)
    learning = [
        parameter for parameter in student.parameters() if parameter.requires_grad and id(parameter) not in fixed
    ]

    def keep_zeros() -> None:
        for weight, kept in masked:
            weight.mul_(kept)

    return distill(
        student,
        teacher,
        train,
        validation,
        [Group(learning)],
        recipe,
        what=what,
        after_step=keep_zeros,
        checkpoints=checkpoints,
        keep_end=keep_end,
    )


def zero_counts(model: PreTrainedModel) -> dict[str, int]:
    return {name: int((weight_of(module) == 0).sum()) for name, module in block_matrices(model).items()}


def share_of_zeros(model: PreTrainedModel) -> float:
    weights = sum(weight_of(module).numel() for module in block_matrices(model).values())
    return sum(zero_counts(model).values()) / weights


def require_zeros(before: dict[str, int], after: dict[str, int]) -> None:
    for name, count in before.items():
        if after[name] < count:
            raise CheckFailed(f"recovery left {after[name]} zeros in {name}, pruning made {count}; this is a bug")
