"""A checkpoint as a model to compute with."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.artifacts import Checkpoint


def load_fp32(checkpoint: Checkpoint, device: str) -> PreTrainedModel:
    """On `device`, in fp32 and in eval mode: no dropout, neither in measuring nor in the short trainings."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    return model.to(device).eval()
