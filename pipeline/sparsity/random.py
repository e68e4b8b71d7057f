"""Random pruning: the baseline that every other method has to beat."""

import torch
from torch import Generator, Tensor


def scores(weight: Tensor, generator: Generator) -> Tensor:
    """Uniform noise, the same on every device: drawn on the CPU from the seeded `generator`."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)
