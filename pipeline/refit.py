"""The best values of the weights that pruning left, for what the dense matrix makes of their inputs.

SparseGPT only ever corrects the columns to its right; with the mask known, all that stay can be fitted at once: least
squares for each row, as in Boža (arXiv:2401.02938), here by conjugate gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.activations import Gram
from pipeline.hessian import damped

STEPS = 20  # of conjugate gradients: more change nothing in the first four digits of the output error


def refit(pruned: Tensor, dense: Tensor, gram: Gram, steps: int = STEPS) -> Tensor:
    """(out, in): `pruned` with its zeros, the other weights such that its outputs are nearest to those of `dense`.

    Minimizes tr((W - D) H (W - D)ᵀ), H the damped mean of x xᵀ, over the weights that are not zero.
    """
    hessian = damped(gram)
    scale = hessian.diagonal()  # Jacobi's preconditioner
    tiny = torch.finfo(torch.float32).tiny
    mask = pruned != 0
    fitted = pruned.clone()
    residual = (dense - pruned) @ hessian * mask
    direction = residual / scale
    size = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = direction @ hessian * mask
        length = size / (direction * image).sum(1, keepdim=True).clamp(min=tiny)
        fitted += length * direction
        residual -= length * image
        rescaled = residual / scale
        before, size = size, (residual * rescaled).sum(1, keepdim=True)
        direction = rescaled + size / before.clamp(min=tiny) * direction
    return fitted
