"""Magnitude pruning (Han et al., arXiv:1506.02626): the smallest weights matter least."""

from torch import Generator, Tensor


def scores(weight: Tensor, generator: Generator) -> Tensor:
    return weight.abs()
