"""Random pruning: the baseline that every other method has to beat."""

import torch
from torch import Generator, Tensor

from pipeline.activations import Gram
from pipeline.masks import Target


def scores(weight: Tensor, generator: Generator) -> Tensor:
    """Uniform noise, the same on every device: drawn on the CPU from the seeded `generator`."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def prune(weight: Tensor, gram: Gram | None, target: Target, generator: Generator) -> Tensor:
    return weight * target.mask(scores(weight, generator))
