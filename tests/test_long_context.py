from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import long_context as stage
from pipeline.export import convert
from pipeline.extend import with_context
from pipeline.long_context import contexts_of, long_context, of_files
from pipeline.long_text import joined, window
from pipeline.metrics import LongContextRow
from scripts.make_random_gpt2 import make

V = 50
BEFORE = [[0, *range(n, n + 9), 49] for n in range(1, 21)]  # 200 tokens without their begin tokens
QUOTES = [[0, *range(n, n + 4), 49] for n in range(1, 13)]


@pytest.fixture
def asked(monkeypatch):
    """Windows that llama.cpp was asked about; it answers that a token follows itself with 10 more in its logit."""
    seen = []

    def logits(tools, gguf, windows):
        for ids in windows:
            seen.append(ids)
            yield (10 * np.eye(V, dtype=np.float32))[np.array(ids)]

    monkeypatch.setattr(stage.llama_cpp, "logits", logits)
    return seen


def measure(contexts, quotes=QUOTES, before=BEFORE):
    return long_context(None, None, quotes, before, contexts, bootstrap=100, seed=3)


def test_contexts_double_from_what_the_base_model_has():
    assert contexts_of(1024, 4096) == [1024, 2048, 4096]
    assert contexts_of(1024, 3000) == [1024, 2048, 3000]


def test_every_context_ends_in_the_same_quotes_and_the_longer_only_adds_in_front(asked):
    rows = measure([64, 128])
    short, long = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    assert {len(ids) for ids in short} == {64} and {len(ids) for ids in long} == {128}
    for less, more in zip(short, long, strict=True):
        assert more[-63:] == less[1:] and more[0] == less[0] == 0
    assert [row["tokens"] for row in rows] == [60, 60]
    assert [row["quotes"] for row in rows] == [12, 12]


def test_no_scored_token_is_left_out_or_counted_twice(asked):
    measure([64])
    tails = [token for ids in asked for token in ids[-(30 if len(asked) == 2 else 60) :]]
    assert sorted(tails) == sorted(token for ids in QUOTES for token in ids[1:])


def test_perplexity_is_that_of_the_quotes_own_tokens(asked):
    """No token follows itself in a quote, so each costs log(e^10 + 49)."""
    (row,) = measure([64])
    assert row["perplexity"]["value"] == pytest.approx(np.exp(10) + V - 1, rel=1e-6)
    assert row["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_text_too_short_for_a_context_is_a_null_with_the_sum(asked):
    short, long = measure([128, 512])
    assert short["perplexity"]["value"] > 1
    assert long["perplexity"] == long["ratio"]
    assert long["perplexity"]["value"] is None
    assert (
        "451 tokens of other text before the held-out quotes are needed, there are 200" in long["perplexity"]["reason"]
    )


def test_every_file_is_measured_by_its_name_and_none_without_an_extension(asked):
    def measured(context):
        files = [Path("a/x.gguf"), Path("b/y.gguf")]
        return of_files(None, files, 64, context, QUOTES, BEFORE, bootstrap=100, seed=3)

    found = measured(128)
    assert list(found) == ["x.gguf", "y.gguf"]
    assert found["x.gguf"] == measure([64, 128])
    assert all(LongContextRow.model_validate(row) for row in found["y.gguf"])
    assert measured(64) == {
        "value": None,
        "reason": "export.context is not set: the files have the base model's 64 positions",
    }


def test_no_more_is_scored_than_the_limit_and_every_source_has_its_share(asked, monkeypatch):
    monkeypatch.setattr(stage, "MOST_TOKENS", 40)
    first = [[0, n, 49] for n in range(1, 21)]
    second = [[0, n, 49] for n in range(21, 41)]
    (row,) = measure([64], quotes=first + second)
    assert row["tokens"] <= 40
    scored = [token for ids in asked for token in ids[-row["tokens"] // len(asked) :] if token != 49]
    assert min(scored) <= 20 < max(scored)


@pytest.fixture(scope="module")
def toy(gpt2_vocab, tmp_path_factory):
    """64 positions, extended to 256."""
    folder = tmp_path_factory.mktemp("long")
    model = make(folder / "model", gpt2_vocab, layers=1, width=64, heads=2, positions=64)
    return with_context(model, 256, folder / "extended")


def test_llama_cpps_perplexity_far_back_is_torchs(toy, llama_cpp, tmp_path):
    convert(toy, llama_cpp, "toy", tmp_path / "toy.gguf", f16_positions=True)
    before = [[50256, *range(100 * n, 100 * n + 20), 50256] for n in range(1, 20)]
    quotes = [[50256, *range(7000 + 100 * n, 7000 + 100 * n + 5), 50256] for n in range(1, 6)]
    rows = long_context(llama_cpp, tmp_path / "toy.gguf", quotes, before, [64, 128, 256], bootstrap=100, seed=0)
    assert [row["context"] for row in rows] == [64, 128, 256]
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32).eval()
    order = stage.random.Random(0).sample(quotes, len(quotes))
    for row in rows:
        ids = torch.tensor([window(joined(before, 0), order, row["context"])])
        with torch.inference_mode():
            logits = model(ids).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[-31:-1], ids[0, -30:])
        assert row["tokens"] == 30
        assert row["perplexity"]["value"] == pytest.approx(float(nll.exp()), rel=1e-3)
        assert row["perplexity"]["low"] <= row["perplexity"]["value"] <= row["perplexity"]["high"]
