"""A model in shares, one on each GPU (FSDP, arXiv:2304.11277): the Trainer's settings for it, and the whole of a model
and its optimizer for a checkpoint, which any number of processes can go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

State = dict[str, Any]

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# Each process has read the whole; a head that is tied to the embedding is not in the file.
FROM_WHOLE = StateDictOptions(full_state_dict=True, strict=False)


def arguments(sharding: str) -> State:
    """For `TrainingArguments`. Each block is gathered when its turn comes."""
    if sharding == "none":
        return {}
    wrapping = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}
    return {"fsdp": True, "fsdp_config": wrapping}


def whole_model(model: nn.Module) -> State:
    """In the first process, on its CPU; elsewhere nothing. To be called by all."""
    return get_model_state_dict(model, options=WHOLE)


def whole_optimizer(model: nn.Module, optimizer: Optimizer) -> State:
    """As `whole_model`."""
    return dict(get_optimizer_state_dict(model, bare(optimizer), options=WHOLE))


def put_back_model(model: nn.Module, folder: Path) -> None:
    """From a model folder that every process can read."""
    state: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    set_model_state_dict(model, state, options=FROM_WHOLE)


def put_back_optimizer(model: nn.Module, optimizer: Optimizer, file: Path) -> None:
    state = torch.load(file, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, bare(optimizer), state, options=FROM_WHOLE)


def bare(optimizer: Any) -> Optimizer:
    """Without accelerate's wrapping."""
    found: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found
