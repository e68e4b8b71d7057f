"""What can be known before anything is loaded: names, tools, device, a writable output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pipeline import llama_cpp
from pipeline.config import JobConfig
from pipeline.device import Device, choose_device, choose_precision
from pipeline.errors import NotAllowed
from pipeline.llama_cpp import LlamaCpp
from pipeline.quant_types import check_types
from pipeline.sparsify import check_method
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


def check_work_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError as e:
        raise NotAllowed(f"work_dir {path} cannot be made ({e.strerror}); choose a folder that can be written") from e
    if not writable:
        raise NotAllowed(f"work_dir {path} cannot be written; choose a folder that can")
