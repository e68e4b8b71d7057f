from __future__ import annotations

from typing import Any

import pytest
import yaml

from pipeline import model_card as cards
from pipeline.config import EvaluateConfig


def model_card(metrics, name, files):
    return cards.model_card(metrics, name, files, EvaluateConfig().sampling)


ROW = {
    "stage": "finished",
    "file": "voice-Q2_K.gguf",
    "type": "Q2_K",
    "engine": "llama.cpp",
    "quotes": 20,
    "tokens": 412,
    "perplexity": {"value": 61.234, "low": 45.0, "high": 83.0},
    "bits_per_byte": 1.4567,
    "ppl_ratio": {"value": 1.25, "low": 1.2, "high": 1.3},
    "kl_mean": 0.2,
    "same_top": 0.712,
    "size_bytes": 70_700_000,
    "bits_per_weight": 4.43,
    "zeros": {"value": None, "reason": "not a llama.cpp file"},
}
METRICS: dict[str, Any] = {
    "run_id": "abc123",
    "settings": [{"key": "model.base", "value": "openai-community/gpt2", "origin": "default", "meaning": ""}],
    "data": {
        "quotes": 205,
        "sources": [
            {
                "name": "a|b.txt",
                "kept": 111,
                "found": 112,
                "exact_duplicates": 1,
                "near_duplicates": 2,
                "sha256": "f" * 64,
            }
        ],
    },
    "ledger": [ROW],
    "ggufs": [{"name": "voice-Q2_K.gguf", "type": "Q2_K"}],
}
FILES = ["voice-Q2_K.gguf", "metrics.json"]


def front_matter(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_the_front_matter_names_base_licence_and_quantization() -> None:
    found = front_matter(model_card(METRICS, "voice", FILES))
    assert found["license"] == "mit"
    assert found["base_model"] == "openai-community/gpt2"
    assert found["quantization"] == ["Q2_K"]


def test_an_unknown_or_local_base_claims_no_licence() -> None:
    for base in ("/models/mine: [x]", "someone/else"):
        found = front_matter(model_card({"settings": [{"key": "model.base", "value": base}]}, "voice", FILES))
        assert found["license"] == "other" and "base_model" not in found


def test_the_card_gives_the_exact_commands() -> None:
    card = model_card(METRICS, "Voice", FILES)
    assert (
        'llama-completion -m voice-Q2_K.gguf -p "I" -n 80 --temp 0.8 --top-p 0.95 --repeat-penalty 1.1 -no-cnv' in card
    )
    assert "ollama create voice -f Modelfile" in card
    assert "-m metrics.json" not in card


def test_the_ledger_shows_every_figure_with_its_interval() -> None:
    card = model_card(METRICS, "voice", FILES)
    row = "| voice-Q2_K.gguf, finished | 61.23 (45 to 83) | 1.457 | ×1.25 (1.2 to 1.3) | 71.2% | 70.7 | 4.43 |"
    assert row in card
    assert "20 held-out quotes (412 tokens)" in card


def test_a_null_shows_its_reason() -> None:
    row = {**ROW, "perplexity": {"value": None, "reason": "llama.cpp is missing"}, "same_top": None}
    card = model_card({**METRICS, "ledger": [row]}, "voice", FILES)
    assert "| not measured: llama.cpp is missing |" in card and "| not measured |" in card


def test_the_sources_stand_with_their_counts() -> None:
    card = model_card(METRICS, "voice", FILES)
    assert "| a\\|b.txt | 111 | 112 | 3 | `ffffffffffff` |" in card


def test_the_card_of_a_rejected_release_says_so_first_and_why() -> None:
    missed = {"gate": "kld", "file": "voice-Q2_K.gguf", "found": 0.31, "limit": 0.2, "passed": False}
    kept = {"gate": "max_bytes", "file": "voice-Q2_K.gguf", "found": 10, "limit": 20, "passed": True}
    card = model_card({**METRICS, "gates": [missed, kept]}, "voice", FILES)
    top = card.split("# voice\n\n")[1].split("\n\n")[0]
    assert top.startswith("> **Rejected") and "a KL divergence of 0.31 nats a token" in top and "at most 0.2" in top
    assert "max_bytes" not in top.split("choose")[0]
    assert "Rejected" not in model_card({**METRICS, "gates": [kept]}, "voice", FILES)


def test_a_card_of_nothing_still_says_so() -> None:
    card = model_card({}, "voice", [])
    assert "Nothing was measured." in card and "sources were not recorded" in card


def test_the_modelfile_continues_the_prompt_as_it_is() -> None:
    lines = cards.modelfile("voice-Q2_K.gguf", "</s>", EvaluateConfig().sampling).splitlines()
    assert lines[:2] == ["FROM ./voice-Q2_K.gguf", 'TEMPLATE "{{ .Prompt }}"']
    assert {"PARAMETER temperature 0.8", "PARAMETER top_p 0.95", 'PARAMETER stop "</s>"'} <= set(lines)


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("/home/someone/models/my-gpt2/", "my-gpt2"),
        ("./my-gpt2", "my-gpt2"),
        ("models/Smol.gguf", "Smol.gguf"),
    ],
)
def test_the_card_names_the_base_model_but_not_where_it_lay(base, shown):
    card = model_card({"settings": [{"key": "model.base", "value": base}]}, "voice", [])
    assert f"made from {shown} by quotesmith" in card
