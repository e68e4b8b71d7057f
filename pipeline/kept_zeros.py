"""`sparsity.keep_zeros`: pruned weights that are exactly zero in the GGUF too, and what that costs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from pipeline.artifacts import Facts
from pipeline.errors import CheckFailed, ConfigError
from pipeline.forecast import Forecast
from pipeline.gguf_file import BLOCK_MATRIX
from pipeline.gguf_weights import load_weights, read_matrices
from pipeline.matrices import block_matrices, weight_of
from pipeline.sensitivity import divergence, predictions

# Zero is on their grids; on that of Q2_K our encoder puts it. On all others it is by accident only.
KEEP_ZEROS = frozenset(("F32", "F16", "BF16", "Q2_K", "Q3_K", "Q6_K", "Q4_0", "Q5_0", "Q8_0", "TQ1_0", "TQ2_0"))
FREE = "zeros-free.gguf"


def require_types_with_zeros(kind: str, forecast: Forecast) -> None:
    """Raises `ConfigError` when a block matrix of the file gets a type whose grid has no zero."""
    for tensor, stored in forecast.types.items():
        if BLOCK_MATRIX.fullmatch(tensor) and stored not in KEEP_ZEROS:
            raise ConfigError(
                f"sparsity.keep_zeros needs types that can hold a zero, but {kind} stores {tensor} as {stored}; choose "
                "Q2_K, Q3_K_S or Q6_K in quantize.types, or sparsity.keep_zeros false"
            )


def pruned_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Which weights (out, in) of each block matrix are zero."""
    return {name: (weight_of(module) == 0).cpu() for name, module in block_matrices(model).items()}


def require_zeros(model: PreTrainedModel, path: Path, pruned: Mapping[str, Tensor]) -> None:
    """Raises `CheckFailed` when a `pruned` weight is something else than zero in `path`."""
    for name, weight in read_matrices(model, path, list(pruned)).items():
        if lost := int((weight[pruned[name]] != 0).sum()):
            raise CheckFailed(f"{lost} pruned weights of {name} in {path.name} have a value again; this is a bug")


def cost_of_zeros(
    model: PreTrainedModel,
    tuned: PreTrainedModel,
    path: Path,
    sequences: Sequence[Sequence[int]],
    encode_freely: Callable[[Path], object],
) -> Facts:
    """KL in nats a token from `tuned` on `sequences`, of `path` and of the same file with its zeros free.

    `encode_freely` writes the second over a copy of the first. `model` is left with other weights.
    """
    expected = list(predictions(tuned, sequences))
    free = path.with_name(FREE)
    shutil.copyfile(path, free)
    encode_freely(free)
    found = {}
    for name, file in (("kl_kept", path), ("kl_free", free)):
        load_weights(model, file)
        found[name] = divergence(expected, predictions(model, sequences))
    free.unlink()
    return found
