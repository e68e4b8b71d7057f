"""The Cholesky factor that SparseGPT and GPTQ spread their errors with, made safe for few calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.activations import Gram
from pipeline.errors import CheckFailed

DAMPING = 0.01  # of the mean diagonal, added to it: SparseGPT's and GPTQ's own value
TRIES = 6  # the last adds a thousand times the mean diagonal, far more than rounding can have taken


def inverse_factor(gram: Gram, damping: float = DAMPING) -> Tensor:
    """Upper triangular U with UᵀU = H⁻¹, (in, in) float32; row i tells how an error in column i is spread.

    With fewer tokens than inputs the sum of x xᵀ is singular: damping makes it definite. It grows tenfold until the
    factorization succeeds. An input that never fires has the damping alone on its diagonal, so it costs less than any
    other. Raises `CheckFailed` for moments that are not finite or not a sum of squares.
    """
    hessian = gram.mean.double()
    if not torch.isfinite(hessian).all():
        raise CheckFailed(
            f"the second moments of a matrix's inputs over {gram.tokens} tokens are not finite; the model or its "
            "calibration text is broken, train again or choose another text"
        )
    diagonal = hessian.diagonal()
    fires = diagonal > 0  # the others would make the damping depend on how many there are
    mean = diagonal[fires].mean() if fires.any() else diagonal.new_ones(())
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    for growth in range(TRIES):
        lower, failed = torch.linalg.cholesky_ex(hessian + identity * (damping * 10**growth * mean))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                factor: Tensor = upper.float()
                return factor
    raise CheckFailed(
        f"the second moments of a matrix's inputs over {gram.tokens} tokens are not a sum of squares, whatever the "
        "damping; this is a bug"
    )


def damped(gram: Gram, damping: float = DAMPING) -> Tensor:
    """(in, in) float32: the mean of x xᵀ with a share of its mean diagonal added to it, over the inputs that fire."""
    diagonal = gram.mean.diagonal()
    mean = diagonal[diagonal > 0].mean() if (diagonal > 0).any() else diagonal.new_ones(())
    return gram.mean + torch.eye(len(diagonal), device=diagonal.device) * (damping * mean)
