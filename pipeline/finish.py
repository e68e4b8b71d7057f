"""Quantized file to finished file: what it holds is trained, on its exact grid, to predict what the tuned model does.

Types and sizes stay as they are. Trained are what the file keeps in F32 (biases, norms, positions) and, unless
`finish.train` is vectors, the block scales of the Q2_K, Q3_K and Q6_K block matrices.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from pipeline.adapt import has_matrices_to_adapt
from pipeline.artifacts import Calibration, Checkpoint, Facts, GgufFile, GgufSet
from pipeline.calibrate import load_calibration
from pipeline.checkpoints import Checkpoints
from pipeline.config import FinishConfig
from pipeline.distill import Group, Recipe, distill
from pipeline.gguf_weights import (
    freeze_rounded,
    load_weights,
    read_kquants,
    write_kquants,
    write_vectors,
)
from pipeline.grid import put_on_grid, take_off_grid
from pipeline.kept_zeros import pruned_weights, require_zeros
from pipeline.kquants import KQuant
from pipeline.loading import load_fp32
from pipeline.matrices import block_matrices, ids_of_embeddings
from pipeline.rewrite import rewrite

log = logging.getLogger(__name__)

# Times the learning rate. Every token moves a norm or a bias, so they bear larger steps than matrices do; a gain is
# relative to its scale. Measured on SmolLM2, in nats a token after 16 steps: vectors alone at 10 give 0.738, with gains
# at 3 0.717, at 10 0.693; vectors at 30 0.686. Adapting has trained the vectors already: after it, at 30 they went from
# 0.482 to 0.51 at once and were at 0.486 after 150 steps; at 3 they went from 0.470 to 0.452 in 90.
VECTOR_RATE = 30.0
ADAPTED_VECTOR_RATE = 3.0
GAIN_RATE = 10.0


def finish(
    quantized: GgufSet,
    recovered: Checkpoint,
    tuned: Checkpoint,
    calibration: Calibration,
    cfg: FinishConfig,
    *,
    adapting: bool,
    keep_zeros: bool,
    device: str,
    seed: int,
    out: Path,
    checkpoints: Checkpoints | None = None,
) -> GgufSet:
    """Each file of `quantized` trained against `tuned`, under the same name in `out`.

    `adapting` and `keep_zeros` are what it was quantized with. F16 files are not trained. A file whose validation loss
    does not fall stays as it was. Raises `CheckFailed` when the loss is not finite, when a file has another size or
    other types than before, or when a zero that `keep_zeros` has kept is none any more.
    """
    finisher = Finisher(recovered, tuned, calibration, cfg, adapting, keep_zeros, device, seed)
    return rewrite(quantized, "finish", finisher.reason_to_leave, finisher.finish, out, checkpoints)


@dataclass(frozen=True)
class Finisher:
    """What trains a file of `recovered` towards `tuned`."""

    recovered: Checkpoint
    tuned: Checkpoint
    calibration: Calibration
    cfg: FinishConfig
    adapting: bool
    keep_zeros: bool
    device: str
    seed: int

    def reason_to_leave(self, file: GgufFile) -> str | None:
        if file.type == "F16":
            return "F16 has nothing to make up for"
        return None if self.cfg.steps else "finish.steps is 0"

    def finish(self, path: Path, checkpoints: Checkpoints | None) -> Facts:
        """Trains what `path` holds, and writes it over it."""
        train, validation = (load_calibration(self.calibration, split) for split in ("train", "validation"))
        student = load_fp32(self.recovered, self.device)
        pruned = pruned_weights(student) if self.keep_zeros else {}
        load_weights(student, path)
        freeze_rounded(student, path)
        kquants = read_kquants(student, path) if self.cfg.train == "all" else {}
        teacher = load_fp32(self.tuned, self.device)
        recipe = Recipe.of(self.cfg, self.device, self.seed)
        rate = ADAPTED_VECTOR_RATE if self.adapting and has_matrices_to_adapt(path) else VECTOR_RATE
        facts = finish_model(student, teacher, kquants, train, validation, recipe, rate, checkpoints)
        write_vectors(student, path)
        write_kquants(student, path, facts.pop("kquants"))
        require_zeros(student, path, pruned)
        log.info(
            "finish: %s, validation KL %.4f to %.4f nats a token",
            path.name,
            facts["validation_kl_before"],
            facts["validation_kl"],
        )
        return facts


def finish_model(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    kquants: Mapping[str, KQuant],
    train: Sequence[Sequence[int]],
    validation: Sequence[Sequence[int]],
    recipe: Recipe,
    vector_rate: float = VECTOR_RATE,
    checkpoints: Checkpoints | None = None,
) -> Facts:
    """Trains `student`, which computes with the quantized weights, in place: those of its vectors that want a gradient,
    at `vector_rate` times the recipe's rate, and the block scales of `kquants`, by matrix name. The facts have the
    trained ones under `kquants`.
    """
    modules = block_matrices(student)
    others = {id(module.weight) for module in modules.values()} | ids_of_embeddings(student)
    vectors = [p for p in student.parameters() if p.requires_grad and id(p) not in others]
    grids = {name: put_on_grid(modules[name], kquant) for name, kquant in kquants.items()}
    groups = [Group([p for p in vectors if p.ndim > 1]), Group([p for p in vectors if p.ndim == 1], vector_rate)]
    if grids:
        groups.append(Group([gain for grid in grids.values() for gain in grid.parameters()], GAIN_RATE))
    facts = distill(student, teacher, train, validation, groups, recipe, what="finish", checkpoints=checkpoints)
    trained = {name: grid.quantized().to("cpu") for name, grid in grids.items()}
    for name in grids:
        take_off_grid(modules[name])
    return facts | {"kquants": trained}
