"""How well a model predicts each held-out quote, and how far it is from the tuned model.

Every engine gives one (T, V) table of logits a quote; row t predicts token t + 1, so the last is not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

CACHE_BYTES = 1 << 30  # the reference's logits are kept if they fit, else computed again for every row


@dataclass(frozen=True)
class Scores:
    """One entry a quote, over all its predicted tokens: the quote's own and the end token."""

    nll: np.ndarray  # nats, summed
    tokens: np.ndarray
    kl: np.ndarray  # nats, summed: KL(reference || model)
    same_top: np.ndarray  # tokens whose most likely prediction is the reference's


class Reference:
    """The tuned model's logits for the held-out quotes, to be walked through once for each row."""

    def __init__(self, model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> None:
        self.model, self.sequences = model, sequences
        size = sum(map(len, sequences)) * model.config.vocab_size * 4
        self.kept = list(torch_logits(model, sequences)) if size <= CACHE_BYTES else None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.kept if self.kept is not None else torch_logits(self.model, self.sequences))


@torch.inference_mode()
def torch_logits(model: PreTrainedModel, sequences: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """(T, V) float32 on the CPU for each sequence, one at a time: no padding, nothing to mask."""
    model.eval()
    for ids in sequences:
        yield model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu()


def score(logits: Iterable[Tensor], reference: Iterable[Tensor], sequences: Sequence[Sequence[int]]) -> Scores:
    rows = [compare(*pair) for pair in zip(logits, reference, sequences, strict=True)]
    nll, tokens, kl, same_top = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    return Scores(nll, tokens, kl, same_top)


def compare(logits: Tensor, reference: Tensor, ids: Sequence[int]) -> tuple[float, int, float, int]:
    """nll, tokens, kl, same_top of one quote; float64, since the sums run over 50,000 small terms."""
    ours = logits[:-1].double().log_softmax(-1)  # (T-1, V)
    theirs = reference[:-1].double().log_softmax(-1)
    targets = torch.tensor(ids[1:])
    nll = -ours.gather(1, targets[:, None]).sum()
    kl = (theirs.exp() * (theirs - ours)).sum()
    same_top = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    return float(nll), len(targets), float(kl), int(same_top)
