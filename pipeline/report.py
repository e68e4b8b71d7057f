"""What the commands print for people: plain tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.gates import GATES

if TYPE_CHECKING:
    from pipeline.forecast import Forecast
    from pipeline.job import Outcome
    from pipeline.plan import Plan

MADE_BY = {
    "base": ("obtain",),
    "tuned": ("finetune",),
    "pruned": ("sparsify",),
    "recovered": ("recover",),
    "F16": ("export",),
    "quantized": ("quantize", "adapt"),
    "finished": ("finish",),
}
HEADINGS = ("stage", "seconds", "perplexity (95%)", "against tuned (95%)", "size", "bits/weight", "zeros")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def size(number: float) -> str:
    """Bytes as people read them, in powers of ten, as file sizes are."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def measured(value: Any, form: str) -> str:
    return "-" if isinstance(value, dict) else format(value, form)


def interval(value: dict[str, float], form: str) -> str:
    return f"{value['value']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def of_run(outcome: Outcome) -> str:
    """The ledger, three quotes from the first file, and where everything lies."""
    metrics = outcome.metrics
    seconds = {stage["name"]: stage["seconds"] for stage in metrics["stages"]}
    rows = [ledger_row(row, seconds) for row in metrics["ledger"]]
    held_out = metrics["ledger"][0]
    parts = [
        f"{held_out['quotes']} held-out quotes, {held_out['tokens']} tokens",
        table(HEADINGS, rows),
        *gates(metrics["gates"]),
        quotes(metrics),
        where(outcome),
    ]
    return "\n" + "\n\n".join(parts)


def ledger_row(row: dict[str, Any], seconds: dict[str, float]) -> list[str]:
    took = [seconds[stage] for stage in MADE_BY.get(row["stage"], ()) if stage in seconds]
    return [
        f"{row['stage']} {row['type']}" if row["type"] not in (None, row["stage"]) else row["stage"],
        f"{sum(took):.1f}" if took else "-",
        interval(row["perplexity"], ".1f"),
        interval(row["ppl_ratio"], ".3f"),
        size(row["size_bytes"]),
        f"{row['bits_per_weight']:.2f}",
        measured(row["zeros"], ".3f"),
    ]


def gates(results: Sequence[dict[str, Any]]) -> list[str]:
    """The limits that were set, for each file; all passed, since a rejected release ends the run without a report."""
    passed = [(r, GATES[r["gate"]]) for r in results]
    rows = [
        [f"gate.{r['gate']}", r["file"], gate.value.format(r["found"]), f"{gate.bound} {gate.limit.format(r['limit'])}"]
        for r, gate in passed
    ]
    return [table(("gate passed", "file", "found", "limit"), rows)] if rows else []


def quotes(metrics: dict[str, Any], count: int = 3) -> str:
    """The first generation of each of the first prompts, from the first file."""
    file = metrics["ggufs"][0]["name"]
    samples = metrics["generations"][file]["samples"]
    firsts = {sample["prompt"]: sample["text"] for sample in reversed(samples)}
    prompts = list(dict.fromkeys(sample["prompt"] for sample in samples))[:count]
    chosen = [firsts[prompt] for prompt in prompts] if len(prompts) == count else [s["text"] for s in samples[:count]]
    return f"{file} says:\n" + "\n".join(textwrap.indent(" ".join(text.split()), "  “") + "”" for text in chosen)


def where(outcome: Outcome) -> str:
    verb = "published" if outcome.published_now else "already published"
    release = outcome.release
    if outcome.is_latest:
        return f"{verb}: {release.uri}\n" + "\n".join(f"  {release.output}/{file.name}" for file in release.files)
    objects = (f"  {release.uri}/objects/sha256/{file.sha256}  {file.name}" for file in release.files)
    return f"{verb}: {release.uri}; the plain names there are a newer release's\n" + "\n".join(objects)


def of_settings(settings: list[dict[str, Any]]) -> str:
    rows = [[s["key"], show(s["value"]), s["origin"], s["meaning"]] for s in settings]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def settings_markdown(settings: list[dict[str, Any]]) -> str:
    """The README's table of settings."""
    rows = [
        f"| `--{s['key'].replace('_', '-')}` | `{show(s['value'])}` | {s['meaning'].replace('|', ' or ')} |"
        for s in settings
    ]
    return "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows])


def show(value: Any) -> str:
    text = (
        ",".join(map(str, value))
        if isinstance(value, list)
        else str(value).lower()
        if value is False or value is True
        else str(value)
    )
    return text or '""'


def output_size(file: Forecast, budget: int | None) -> str:
    if budget:
        return f"at most {size(budget)}; its types will be chosen by what each costs"
    others = f", {len(file.fallbacks)} tensors in another type than asked for" if file.fallbacks else ""
    return size(file.size_bytes) + others


def of_plan(plan: Plan) -> str:
    sources = [
        [s.name, *(str(n) for n in (s.found, s.kept, s.exact_duplicates, s.near_duplicates, s.blank))]
        for s in plan.corpus.sources
    ]
    headings = ("source", "quotes", "kept", "exact duplicates", "near duplicates", "blank lines")
    splits = [
        [name, str(s["quotes"]), str(s["tokens"]), str(s["truncated"])]
        for name, s in plan.tokens.facts["splits"].items()
    ]
    facts = [
        f"device: {plan.device.name} ({plan.device.why}); precision: {plan.precision.name} ({plan.precision.why})",
        f"training: {plan.steps} optimizer steps of {plan.examples_a_step} examples",
        *(f"output: {name}, {output_size(file, plan.budgets.get(name))}" for name, file in plan.outputs.items()),
        f"disk needed under work_dir: about {size(plan.disk_bytes)}; free: {size(plan.free_bytes)}",
    ]
    tables = [table(headings, sources), table(("split", "quotes", "tokens", "truncated"), splits)]
    return "\n" + "\n\n".join([*tables, "\n".join(facts)])
