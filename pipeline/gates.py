"""Limits for the files of a release, and the sentence for a file that misses one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import GateConfig
from pipeline.metrics import GateResult, Missing

NAMED = 4  # failures in one sentence, which must fit a termination log; metrics.json has the others
CLOSER = (
    "choose a larger type in quantize.types, a lower sparsity.ratio, or more recover.steps, adapt.steps and "
    "finish.steps"
)


@dataclass(frozen=True)
class Gate:
    """How to say what a gate found. `value` and `limit` are formats of one number."""

    value: str
    bound: str  # "at most" or "at least"
    limit: str
    cure: str

    def passes(self, found: float, limit: float) -> bool:
        return found >= limit if self.bound == "at least" else found <= limit


GATES = {  # by the name of the setting
    "ppl_ratio": Gate("{:.6g} times the tuned model's perplexity", "at most", "{:.6g}", CLOSER),
    "kld": Gate("a KL divergence of {:.6g} nats a token from the tuned model", "at most", "{:.6g}", CLOSER),
    "max_bytes": Gate("{:,.0f} bytes", "at most", "{:,.0f}", "choose a smaller type or set quantize.max_bytes"),
    "stop_rate": Gate("a stop rate of {:.6g}", "at least", "{:.6g}", "raise train.epochs or evaluate.max_new_tokens"),
}


def limits(cfg: GateConfig) -> dict[str, float]:
    """The gates that are set; 0 is none."""
    return {name: limit for name in GATES if (limit := getattr(cfg, name))}


def check(figures: Mapping[str, Any], cfg: GateConfig) -> list[GateResult]:
    """Every gate that is set, for every file of the release. `figures` has metrics.json's ledger, ggufs, generations.

    The measured value counts, not its interval. A number that is missing or not finite fails.
    """
    results = []
    for file in figures["ggufs"]:
        found = figures_of(file, figures)
        for name, limit in limits(cfg).items():
            value = number(found[name])
            passed = not isinstance(value, Missing) and GATES[name].passes(value, limit)
            results.append(GateResult(gate=name, file=file["name"], found=value, limit=limit, passed=passed))
    return results


def figures_of(file: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """What each gate looks at. A file's last ledger row is that of the file as it is shipped."""
    name = file["name"]
    row: Mapping[str, Any] = next((row for row in reversed(figures["ledger"]) if row["file"] == name), {})
    return {
        "ppl_ratio": row.get("ppl_ratio"),
        "kld": row.get("kl_mean"),
        "max_bytes": file.get("size_bytes"),
        "stop_rate": figures["generations"].get(name, {}).get("stop_rate"),
    }


def number(value: Any) -> int | float | Missing:
    """A plain number, or the value of an interval; of anything else, why it is none."""
    if isinstance(value, Mapping) and value.get("value") is not None:
        value = value["value"]
    if isinstance(value, Mapping):
        return Missing(value=None, reason=str(value.get("reason", "no reason given")))
    if not isinstance(value, int | float):
        return Missing(value=None, reason="it was not measured")
    return value if math.isfinite(value) else Missing(value=None, reason=f"it came out as {value}")


def finding(result: GateResult) -> str:
    """For example: gate.stop_rate: voice-Q2_K.gguf has a stop rate of 0.25, at least 0.5 is needed"""
    gate = GATES[result.gate]
    found = (
        f"no such figure ({result.found.reason})"
        if isinstance(result.found, Missing)
        else gate.value.format(result.found)
    )
    needed = "needed" if gate.bound == "at least" else "allowed"
    return f"gate.{result.gate}: {result.file} has {found}, {gate.bound} {gate.limit.format(result.limit)} is {needed}"


def cure(result: GateResult) -> str:
    if isinstance(result.found, Missing):
        return f"set gate.{result.gate} to 0 to go without it"
    return GATES[result.gate].cure


def sentence(result: GateResult) -> str:
    """What a failed gate found, its limit, and what to do."""
    return f"{finding(result)}; {cure(result)}"


def failed(results: Sequence[GateResult]) -> list[GateResult]:
    return [result for result in results if not result.passed]


def rejection(results: Sequence[GateResult]) -> str:
    """All failures in one sentence; for one failure, its own."""
    missed = failed(results)
    findings = [finding(result) for result in missed[:NAMED]]
    if len(missed) > NAMED:
        findings.append(f"{len(missed) - NAMED} more are in metrics.json")
    return "; ".join([*findings, *dict.fromkeys(cure(result) for result in missed[:NAMED])])
