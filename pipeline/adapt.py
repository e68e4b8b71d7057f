"""Rounded file to adapted file: the matrices that keep their zeros make up for what rounding did to the others.

Q2_K's grid has no zero, so matrices of that type are rounded from their weights before pruning, and the file has others
than those that recovery trained the rest beside. With them in place the rest is trained once more, the mask fixed, and
rounded after that: incremental network quantization (Zhou et al., arXiv:1702.03044) in two steps. Rounding the rest in
two halves, the second trained beside the first, gained nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.artifacts import Calibration, Checkpoint, Facts, GgufFile, GgufSet
from pipeline.calibrate import load_calibration
from pipeline.checkpoints import Checkpoints
from pipeline.config import AdaptConfig
from pipeline.distill import Recipe
from pipeline.encode import encode_model, to_adapt
from pipeline.gguf_file import GgufContents
from pipeline.gguf_weights import freeze_rounded, load_weights, matrix_types, write_kquants, write_vectors
from pipeline.loading import load_fp32
from pipeline.matrices import block_matrices, weight_of
from pipeline.recover import recover_model
from pipeline.rewrite import rewrite

log = logging.getLogger(__name__)


def adapt(
    rounded: GgufSet,
    recovered: Checkpoint,
    tuned: Checkpoint,
    calibration: Calibration,
    cfg: AdaptConfig,
    *,
    adapting: bool,
    device: str,
    seed: int,
    out: Path,
    checkpoints: Checkpoints | None = None,
) -> GgufSet:
    """Each file of `rounded`, under the same name in `out`, with its Q3_K and Q6_K block matrices rounded, which were
    left to this, after they and what the file keeps in F32 were trained beside the Q2_K ones towards `tuned`.

    `adapting` is what it was quantized with. A file without Q2_K ones stays as it was. Raises `CheckFailed` when the
    loss is not finite, or when a file has another size or other types than before.
    """
    adapter = Adapter(recovered, tuned, calibration, cfg, adapting, device, seed)
    return rewrite(rounded, "adapt", adapter.reason_to_leave, adapter.adapt, out, checkpoints)


@dataclass(frozen=True)
class Adapter:
    """What trains a file of `recovered` towards `tuned`."""

    recovered: Checkpoint
    tuned: Checkpoint
    calibration: Calibration
    cfg: AdaptConfig
    adapting: bool
    device: str
    seed: int

    def reason_to_leave(self, file: GgufFile) -> str | None:
        if not self.adapting:
            return "adapt.steps is 0, quantize.encoder is llama.cpp, or sparsity.keep_zeros is true"
        if has_matrices_to_adapt(file.path):
            return None
        return "no matrix was rounded from its weights before pruning beside others that keep their zeros"

    def adapt(self, path: Path, checkpoints: Checkpoints | None) -> Facts:
        """Trains and rounds what `path` holds, and writes it over it."""
        train, validation = (load_calibration(self.calibration, split) for split in ("train", "validation"))
        student = load_fp32(self.recovered, self.device)
        types = to_adapt(matrix_types(student, path))
        put_beside(student, path, types)
        teacher = load_fp32(self.tuned, self.device)
        recipe = Recipe.of(self.cfg, self.device, self.seed)
        facts = recover_model(student, teacher, train, validation, recipe, checkpoints, what="adapt", keep_end=True)
        after_block = checkpoints.stop_if_asked if checkpoints else lambda: None
        kquants = encode_model(student, train, types, after_block=after_block)
        write_vectors(student, path)
        write_kquants(student, path, kquants)
        log.info(
            "adapt: %s, %d matrices trained from %.4f to %.4f nats a token of validation KL and rounded",
            path.name,
            len(types),
            facts["validation_kl_before"],
            facts["validation_kl"],
        )
        return facts | {"encoded_tensors": len(types)}


def has_matrices_to_adapt(path: Path) -> bool:
    stored = GgufContents(path).matrices.items()
    return bool(to_adapt({name: tensor.tensor_type.name for name, tensor in stored}))


@torch.no_grad()
def put_beside(model: PreTrainedModel, path: Path, names: Collection[str]) -> None:
    """`model` with what `path` holds but for the matrices of these names, which want a gradient, as F32 ones do."""
    modules = {name: module for name, module in block_matrices(model).items() if name in names}
    own = {name: weight_of(module).clone() for name, module in modules.items()}
    load_weights(model, path)
    freeze_rounded(model, path)
    for name, module in modules.items():
        weight_of(module).copy_(own[name])
        module.weight.requires_grad_(True)
