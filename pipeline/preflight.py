"""What can be known before anything is loaded: names, tools, device, a writable output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pipeline import llama_cpp
from pipeline.artifacts import Checkpoint
from pipeline.budget import least
from pipeline.config import JobConfig
from pipeline.device import Device, choose_device, choose_precision
from pipeline.errors import ConfigError
from pipeline.forecast import Forecast, forecasts_of, handle_fallbacks
from pipeline.kept_zeros import require_types_with_zeros
from pipeline.llama_cpp import LlamaCpp
from pipeline.matrices import block_matrices, weight_of
from pipeline.positions import LEARNED, require_extendable
from pipeline.quant_types import check_types
from pipeline.sparsify import check_method, check_pattern
from pipeline.stage import place_of_copies
from pipeline.storage import open_store
from pipeline.team import processes_of_a_node
from pipeline.work_folder import check_work_dir


class Ground(NamedTuple):
    """What the job stands on."""

    tools: LlamaCpp
    device: Device


def preflight(cfg: JobConfig) -> Ground:
    """Raises the error that the job would otherwise meet only after minutes or hours."""
    check_method(cfg.sparsity)
    check_types(cfg.quantize.types, cfg.quantize.importance)
    device = choose_device(cfg.device)
    choose_precision(cfg.train.precision, device.name)
    processes_of_a_node(cfg.train, cfg.nodes, torch.cuda.device_count() if device.name == "cuda" else 0)
    check_work_dir(cfg.work_dir)
    tools = llama_cpp.find(cfg.llama_cpp)
    llama_cpp.require_programs_start(tools)
    places = {cfg.output, place_of_copies(cfg.resume, cfg.output) or cfg.output}
    for place in sorted(places):
        open_store(place).probe()
    if cfg.tensorboard:
        open_store(cfg.tensorboard)  # its scheme is known
    return Ground(tools, device)


def check_model(base: Checkpoint, cfg: JobConfig, tools: LlamaCpp) -> None:
    """Settings against the base model, before an hour is spent on it. Raises `ConfigError`."""
    check_shape(base, cfg)
    if cfg.quantize.fallback == "error" or cfg.gate.max_bytes or cfg.quantize.max_bytes or cfg.sparsity.keep_zeros:
        context = cfg.export.context
        check_files(
            forecasts_of(
                base.path, cfg.quantize.types, tools, name=cfg.name, importance=cfg.quantize.importance, context=context
            ),
            cfg,
        )


def check_shape(base: Checkpoint, cfg: JobConfig) -> None:
    config = AutoConfig.from_pretrained(base.path)
    check_positions(config, cfg)
    with torch.device("meta"):
        matrices = block_matrices(AutoModelForCausalLM.from_config(config))
    check_pattern({name: weight_of(module).shape[1] for name, module in matrices.items()}, cfg.sparsity)


def check_positions(config: PreTrainedConfig, cfg: JobConfig) -> None:
    """Whatever asks for more positions than the model has, or will have."""
    positions = config.max_position_embeddings
    if cfg.tokens.max_length > positions:
        raise ConfigError(
            f"tokens.max_length is {cfg.tokens.max_length}, but the base model has {positions} positions; choose at "
            "most that many (export.context adds more only after training)"
        )
    if cfg.export.context:
        require_extendable(config, cfg.export.context)
    elif cfg.export.context_steps:
        raise ConfigError("export.context_steps trains the positions that export.context adds; set that too")
    exported = cfg.export.context or positions
    if cfg.evaluate.max_new_tokens >= exported:
        raise ConfigError(
            f"evaluate.max_new_tokens is {cfg.evaluate.max_new_tokens}, but the exported model will have {exported} "
            f"positions, the first of them the begin token's; choose at most {exported - 1}"
            + (", or a larger export.context" if config.model_type in LEARNED else "")
        )


def check_files(forecasts: Mapping[str, Forecast], cfg: JobConfig) -> None:
    """What `quantize` and the gates would refuse at the end. `forecasts` has every type of `cfg.quantize.types`."""
    for kind in cfg.quantize.types:
        file = f"{cfg.name}-{kind}.gguf"
        forecast = least(forecasts[kind], file, cfg.quantize.max_bytes)
        if cfg.quantize.fallback == "error":
            handle_fallbacks(kind, forecast.fallbacks, "error")
        if cfg.sparsity.keep_zeros:
            require_types_with_zeros(kind, forecast)
        check_size(file, forecast, cfg)


def check_size(file: str, forecast: Forecast, cfg: JobConfig) -> None:
    """A file larger than `gate.max_bytes`. With `quantize.max_bytes` its size is chosen later, up to that budget."""
    limit, budget = cfg.gate.max_bytes, cfg.quantize.max_bytes
    if not limit:
        return
    least(forecast, file, limit, "gate.max_bytes")
    if budget > limit:
        raise ConfigError(
            f"quantize.max_bytes lets {file} have {budget:,} bytes, but gate.max_bytes allows {limit:,}; "
            "set quantize.max_bytes to at most that"
        )
    if not budget and forecast.size_bytes > limit:
        raise ConfigError(
            f"{file} will have {forecast.size_bytes:,} bytes, but gate.max_bytes allows {limit:,}; raise it, choose a "
            f"smaller type in quantize.types, or set quantize.max_bytes to {limit}"
        )
