"""What a run would do, from the data and the base model's shape, without training."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from pipeline import base_model
from pipeline.artifacts import Corpus, TokenDataset
from pipeline.base_model import obtain
from pipeline.budget import roles_of
from pipeline.config import JobConfig
from pipeline.device import Device, Precision, choose_precision
from pipeline.fetch import fetch
from pipeline.finetune import optimizer_steps
from pipeline.forecast import Forecast, forecasts_of
from pipeline.inputs import content_hash, resolve
from pipeline.preflight import Ground, check_files, check_shape, preflight
from pipeline.room import disk_needed
from pipeline.settings import Resolved
from pipeline.stage import Stages
from pipeline.tokens import tokenize
from pipeline.work_folder import alone_in


@dataclass(frozen=True)
class Plan:
    corpus: Corpus
    tokens: TokenDataset
    device: Device
    precision: Precision
    steps: int
    examples_a_step: int
    outputs: dict[str, Forecast]  # by file name
    budgets: dict[str, int]  # bytes, by name of the files whose types will be chosen
    disk_bytes: int
    free_bytes: int


def plan(resolved: Resolved) -> Plan:
    """Fetches, obtains the base model and tokenizes: a run afterwards finds these stages done."""
    cfg = resolved.config
    ground = preflight(cfg)
    with alone_in(cfg.work_dir, cfg.lease.wait_seconds):
        return planned(cfg, ground)


def planned(cfg: JobConfig, ground: Ground) -> Plan:
    tools, device = ground
    stages = Stages(cfg.work_dir)
    inputs = resolve(cfg.input, cfg.data)
    corpus = stages.run(fetch, inputs, cfg.data, outside=content_hash(inputs))
    base = stages.run(obtain, cfg.model, outside=base_model.resolve(cfg.model))
    check_shape(base, cfg)
    kinds = list(dict.fromkeys(("F16", *cfg.quantize.types)))
    forecasts = forecasts_of(
        base.path, kinds, tools, name=cfg.name, importance=cfg.quantize.importance, context=cfg.export.context
    )
    check_files(forecasts, cfg)
    tokens = stages.run(tokenize, corpus, base, cfg.tokens)
    sizes = {kind: max(forecast.size_bytes, cfg.quantize.max_bytes) for kind, forecast in forecasts.items()}
    sizes["F16"] = forecasts["F16"].size_bytes
    return Plan(
        corpus,
        tokens,
        device,
        choose_precision(cfg.train.precision, device.name),
        steps=optimizer_steps(tokens.facts["splits"]["train"]["quotes"], cfg.train),
        examples_a_step=cfg.train.batch_size * cfg.train.accumulation,
        outputs={f"{cfg.name}-{kind}.gguf": forecasts[kind] for kind in cfg.quantize.types},
        budgets={
            f"{cfg.name}-{kind}.gguf": cfg.quantize.max_bytes
            for kind in cfg.quantize.types
            if cfg.quantize.max_bytes and roles_of(forecasts[kind])
        },
        disk_bytes=sum(disk_needed(base, cfg, sizes).values()),
        free_bytes=shutil.disk_usage(cfg.work_dir).free,
    )
