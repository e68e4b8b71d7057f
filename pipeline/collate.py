"""Examples to a batch: padded to its longest, with no label on padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label that cross-entropy skips


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, each (B, T).

    Padding is told by its place, never by its id: GPT-2 has no padding token, and taking every end token for
    padding would hide the one label that teaches the model to stop.
    """
    rows = [example["input_ids"] for example in examples]
    shape = (len(rows), max(len(row) for row in rows))
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
