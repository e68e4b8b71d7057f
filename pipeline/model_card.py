"""The release's README.md and Modelfile: what the files are, how good, how to run them, where they came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from pipeline.gates import failed, sentence
from pipeline.metrics import GateResult

LICENSES = {
    "openai-community/gpt2": "mit",
    "gpt2": "mit",
    "distilbert/distilgpt2": "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M": "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
}


def model_card(metrics: Mapping[str, Any], name: str, files: Sequence[str], sampling: Mapping[str, float]) -> str:
    """Markdown for the Hugging Face hub. Figures that are absent or null are shown as such, never left out."""
    ggufs = [file for file in files if file.endswith(".gguf")]
    parts = [
        front_matter(metrics, ggufs),
        f"# {name}",
        rejection(metrics),
        f"A small language model that writes in the voice of the quotes it was tuned on, made from "
        f"{base_of(metrics) or 'an unnamed base model'} by quotesmith in run `{metrics.get('run_id', 'unknown')}`.",
        "## Run it",
        commands(name, ggufs, sampling),
        "## How good it is",
        ledger_text(metrics),
        "## What it was trained on",
        sources_table(metrics),
        "## Limits",
        LIMITS,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def modelfile(gguf_name: str, stop: str, sampling: Mapping[str, float]) -> str:
    """An Ollama Modelfile: the prompt goes in as it is, since the model continues text and knows no chat."""
    lines = [f"FROM ./{gguf_name}", 'TEMPLATE "{{ .Prompt }}"']
    names = {"max_new_tokens": "num_predict"}
    lines += [f"PARAMETER {names.get(key, key)} {value}" for key, value in sampling.items()]
    lines += [f'PARAMETER stop "{stop}"']
    return "\n".join(lines) + "\n"


LIMITS = """\
- It imitates a way of speaking. What it says is invented, also where it sounds like a fact or like a person.
- A model tuned on few quotes repeats some of them; `metrics.json` says how much of its output is copied.
- It was measured on held-out quotes of the same sources only, not on other tasks.
- It completes text and does not follow instructions."""


def rejection(metrics: Mapping[str, Any]) -> str:
    """Why the release was rejected, one line a limit that it misses; nothing if it was not."""
    missed = failed([GateResult.model_validate(result) for result in metrics.get("gates", [])])
    lines = ["**Rejected: this release misses limits that were set for it.**", *(f"- {sentence(r)}" for r in missed)]
    return "\n".join(f"> {line}" for line in lines) if missed else ""


def front_matter(metrics: Mapping[str, Any], ggufs: Sequence[str]) -> str:
    base = base_of(metrics)
    fields: dict[str, Any] = {
        "license": LICENSES.get(base, "other"),
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "ollama", "quotesmith"],
    }
    if base in LICENSES:  # the hub refuses a card whose base model it does not have
        fields |= {"base_model": base, "base_model_relation": "quantized"}
    types = [gguf.get("type", "") for gguf in metrics.get("ggufs", [])]
    if ggufs and any(types):
        fields["quantization"] = types
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def commands(name: str, ggufs: Sequence[str], sampling: Mapping[str, float]) -> str:
    names = {"max_new_tokens": "-n", "temperature": "--temp", "top_p": "--top-p", "repeat_penalty": "--repeat-penalty"}
    options = " ".join(f"{names[key]} {value}" for key, value in sampling.items())
    lines = [f'llama-completion -m {gguf} -p "I" {options} -no-cnv' for gguf in ggufs]
    ollama = [f"ollama create {name.lower()} -f Modelfile", f'ollama run {name.lower()} "I"']
    return (
        f"With [llama.cpp](https://github.com/ggml-org/llama.cpp):\n\n{code(lines)}\n\n"
        f"With [Ollama](https://ollama.com), in the folder that holds the `Modelfile`:\n\n{code(ollama)}"
    )


def ledger_text(metrics: Mapping[str, Any]) -> str:
    rows = metrics.get("ledger") or []
    if not rows:
        return "Nothing was measured."
    quotes, tokens = rows[0].get("quotes", "?"), rows[0].get("tokens", "?")
    header = ("model", "perplexity (95%)", "bits/byte", "against tuned (95%)", "same top token", "MB", "bits/weight")
    body = [
        (
            f"{row['file']}, {row.get('stage')}" if row.get("file") else row.get("stage") or "?",
            interval(row.get("perplexity")),
            number(row.get("bits_per_byte"), ".3f"),
            interval(row.get("ppl_ratio"), "×"),
            number(row.get("same_top"), ".1%"),
            number(row.get("size_bytes"), ".1f", 1e-6),
            number(row.get("bits_per_weight"), ".2f"),
        )
        for row in rows
    ]
    return (
        f"Every row was scored on the same {quotes} held-out quotes ({tokens} tokens); lower perplexity is "
        f"better.\n\n{table(header, body)}"
    )


def sources_table(metrics: Mapping[str, Any]) -> str:
    data = metrics.get("data") or {}
    body = [
        (
            source.get("name", "?"),
            source.get("kept", "?"),
            source.get("found", "?"),
            source.get("exact_duplicates", 0) + source.get("near_duplicates", 0),
            f"`{str(source.get('sha256', ''))[:12]}`",
        )
        for source in data.get("sources", [])
    ]
    if not body:
        return "The sources were not recorded."
    total = f"{data.get('quotes', '?')} quotes, part of them held out to measure with."
    return f"{total}\n\n{table(('source', 'quotes used', 'found', 'duplicates dropped', 'SHA-256'), body)}"


def base_of(metrics: Mapping[str, Any]) -> str:
    """The base model's hub id, or the name alone of a folder or file: where it lay is nobody's business."""
    settings = metrics.get("settings") or []
    values = {row.get("key"): row.get("value") for row in settings if isinstance(row, Mapping)}
    base = str(values.get("model.base") or "")
    is_id = base.count("/") <= 1 and not base.startswith((".", "/", "~")) and not base.endswith(".gguf")
    return base if is_id else base.rstrip("/").rpartition("/")[2]


def number(value: Any, form: str, scale: float = 1) -> str:
    """The formatted number; for a null with a reason, the reason."""
    if isinstance(value, Mapping):
        inner = value.get("value")
        return (
            f"not measured: {value.get('reason', 'no reason given')}" if inner is None else number(inner, form, scale)
        )
    return "not measured" if value is None else format(value * scale, form)


def interval(value: Any, prefix: str = "") -> str:
    if isinstance(value, Mapping) and value.get("value") is not None and "low" in value:
        low, high = number(value["low"], ".4g"), number(value.get("high"), ".4g")
        return f"{prefix}{number(value['value'], '.4g')} ({low} to {high})"
    return number(value, ".4g")


def table(header: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    rows = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cell(value) for value in row) + " |" for row in rows)


def cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def code(lines: Sequence[str]) -> str:
    return "```bash\n" + "\n".join(lines) + "\n```"
