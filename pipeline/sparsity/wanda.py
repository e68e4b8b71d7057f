"""Wanda (arXiv:2306.11695): drop the weights with the smallest |W| · ‖X‖, row by row."""

from torch import Generator, Tensor

from pipeline.activations import Gram
from pipeline.masks import Target


def prune(weight: Tensor, gram: Gram, target: Target, generator: Generator) -> Tensor:
    score = weight.abs() * gram.total.diagonal().sqrt()  # (out, in) * (in,)
    return weight * target.row_mask(score)
