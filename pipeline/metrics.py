"""metrics.json: everything a run measured, in one schema (`metrics.schema.json`, made from these models)."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.memory import usable_cores
from pipeline.stage import StageRecord

SCHEMA_VERSION = 1
SCHEMA_PATH = Path(__file__).parent / "metrics.schema.json"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Missing(Strict):
    """A number that could not be measured, and why."""

    value: None
    reason: str


class Interval95(Strict):
    value: float
    low: float
    high: float


class Setting(Strict):
    key: str
    value: Any
    origin: str
    meaning: str


class Source(Strict):
    name: str
    uri: str
    sha256: str
    size_bytes: int
    found: int
    blank: int
    exact_duplicates: int
    near_duplicates: int
    kept: int


class Data(Strict):
    quotes: int
    sources: list[Source]
    tokens: dict[str, Any] = Field(description="Quotes, tokens and length percentiles by split and by source.")


class StageFigures(Strict):
    name: str
    seconds: float = Field(description="Wall time; of the earlier run when the stage was skipped.")
    peak_memory_bytes: int
    peak_gpu_bytes: int | Missing
    skipped: bool
    facts: dict[str, Any]


class LedgerRow(Strict):
    stage: str
    file: str | None
    type: str | None = Field(description="Of the file.")
    engine: str
    quotes: int
    tokens: int
    perplexity: Interval95
    bits_per_byte: float
    ppl_ratio: Interval95 = Field(description="Against the tuned model, paired over the same quotes.")
    kl_mean: float = Field(description="Nats a token, KL(tuned || this).")
    same_top: float = Field(description="Share of tokens whose most likely prediction is the tuned model's.")
    size_bytes: int
    bits_per_weight: float
    zeros: float | Missing = Field(description="Share of the block matrices' weights that are exactly zero.")


class Gguf(Strict):
    name: str
    type: str
    sha256: str
    size_bytes: int
    speed: dict[str, float] | Missing = Field(description="Under llama.cpp on this machine's CPU.")
    facts: dict[str, Any]


class GateResult(Strict):
    """A limit of the settings, and what one file of the release has."""

    gate: str = Field(description="The setting's name: ppl_ratio, kld, max_bytes, stop_rate.")
    file: str
    found: int | float | Missing
    limit: int | float
    passed: bool


class Generations(Strict):
    stop_rate: float
    repeat_share: float
    copied_share: float
    copied_run_words: int
    samples: list[dict[str, Any]]


class LongContextRow(Strict):
    """Held-out quotes at the end of a text of `context` tokens; before them is calibration text, none of it twice."""

    context: int
    quotes: int
    tokens: int = Field(description="Scored: those of the held-out quotes.")
    perplexity: Interval95 | Missing
    ratio: Interval95 | Missing = Field(description="Against the first context, paired over the same quotes.")


class Hardware(Strict):
    machine: str
    cpu: str
    cores: int
    memory_bytes: int
    gpu: str | Missing


class Metrics(Strict):
    """The figures of one quotesmith run."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    name: str
    created: str = Field(description="UTC, ISO 8601.")
    settings: list[Setting]
    data: Data
    stages: list[StageFigures]
    ledger: list[LedgerRow]
    nf4: dict[str, Any]
    ggufs: list[Gguf]
    generations: dict[str, Generations]
    long_context: dict[str, list[LongContextRow]] | Missing = Field(
        description="By file: perplexity at the base model's positions, twice that, …, export.context."
    )
    gates: list[GateResult] = Field(description="Every gate that is set, for every file; empty when none is.")
    versions: dict[str, str]
    hardware: Hardware


def schema() -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Metrics.model_json_schema()}


FACTS_ELSEWHERE = ("tokenize", "evaluate")  # in the file's `data` and `ledger`


def stage_figures(records: Sequence[StageRecord], facts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": record.name,
            "seconds": record.seconds,
            "peak_memory_bytes": record.peak_memory_bytes,
            "peak_gpu_bytes": {"value": None, "reason": "no GPU is visible"}
            if record.peak_gpu_bytes is None
            else record.peak_gpu_bytes,
            "skipped": record.skipped,
            "facts": {} if record.name in FACTS_ELSEWHERE else facts.get(record.name, {}),
        }
        for record in records
    ]


def hardware() -> dict[str, Any]:
    gpu = gpu_name()
    return {
        "machine": platform.platform(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu or {"value": None, "reason": "no GPU is visible"},
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def write(path: Path, metrics: Metrics) -> Path:
    path.write_text(json.dumps(metrics.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False))
    return path
