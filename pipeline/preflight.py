"""What can be known before anything is loaded: names, tools, device, a writable output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import llama_cpp
from pipeline.artifacts import Checkpoint
from pipeline.config import JobConfig
from pipeline.device import Device, choose_device, choose_precision
from pipeline.errors import ConfigError, NotAllowed
from pipeline.llama_cpp import LlamaCpp
from pipeline.matrices import block_matrices, weight_of
from pipeline.quant_types import check_types
from pipeline.quantize import refuse_fallbacks
from pipeline.sparsify import check_method, check_pattern
from pipeline.storage import open_store


class Ground(NamedTuple):
    """What the job stands on."""

    tools: LlamaCpp
    device: Device


def preflight(cfg: JobConfig) -> Ground:
    """Raises the error that the job would otherwise meet only after minutes or hours."""
    check_method(cfg.sparsity.method)
    check_types(cfg.quantize.types)
    device = choose_device(cfg.device)
    choose_precision(cfg.train.precision, device.name)
    check_work_dir(cfg.work_dir)
    tools = llama_cpp.find(cfg.llama_cpp)
    open_store(cfg.output).probe()
    return Ground(tools, device)


def check_model(base: Checkpoint, cfg: JobConfig, tools: LlamaCpp) -> None:
    """Settings against the base model's shape, before an hour is spent on it. Raises `ConfigError`."""
    config = AutoConfig.from_pretrained(base.path)
    if cfg.tokens.max_length > config.max_position_embeddings:
        raise ConfigError(
            f"tokens.max_length is {cfg.tokens.max_length}, but the base model has {config.max_position_embeddings} "
            "positions; choose at most that many"
        )
    with torch.device("meta"):
        matrices = block_matrices(AutoModelForCausalLM.from_config(config))
    check_pattern({name: weight_of(module).shape[1] for name, module in matrices.items()}, cfg.sparsity)
    if cfg.quantize.fallback == "error":
        refuse_fallbacks(base.path, cfg.quantize, tools)


def check_work_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError as e:
        kind = ConfigError if isinstance(e, FileExistsError | NotADirectoryError) else NotAllowed
        raise kind(f"work_dir {path} cannot be made ({e.strerror}); choose a folder that can be written") from e
    if not writable:
        raise NotAllowed(f"work_dir {path} cannot be written; choose a folder that can")
