"""Magnitude pruning (Han et al., arXiv:1506.02626): the smallest weights matter least."""

from torch import Generator, Tensor

from pipeline.activations import Gram
from pipeline.masks import Target


def scores(weight: Tensor, generator: Generator) -> Tensor:
    return weight.abs()


def prune(weight: Tensor, gram: Gram | None, target: Target, generator: Generator) -> Tensor:
    return weight * target.mask(scores(weight, generator))
