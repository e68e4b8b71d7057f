import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import evaluate as stage
from pipeline import llama_cpp
from pipeline.artifacts import Checkpoint, Corpus, GgufFile, GgufSet, Source, sha256_of
from pipeline.config import EvaluateConfig, FourbitConfig, TokensConfig
from pipeline.evaluate import Scoreboard, evaluate, held_out, text_bytes, zeros_of
from pipeline.matrices import block_matrices, weight_of
from pipeline.tokens import load_split, tokenize
from tests.calibrated import calibration_in

TEXTS = [f"“Número {i}” is what I said, and I meant it" for i in range(60)]


@pytest.fixture(scope="module")
def base(toy_gpt2):
    return Checkpoint.of(toy_gpt2, {})


@pytest.fixture(scope="module")
def tokens(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    path = folder / "quotes.jsonl"
    path.write_text("".join(json.dumps({"text": t, "source": "a.txt", "key": t}) + "\n" for t in TEXTS))
    source = Source("a.txt", "a.txt", "0" * 64, 1, len(TEXTS), 0, 0, 0, len(TEXTS))
    return tokenize(Corpus(path, sha256_of(path), (source,)), base, TokensConfig(holdout=0.4), out=folder)


@pytest.fixture(scope="module")
def board(base, tokens):
    return Scoreboard(base, tokens, EvaluateConfig(bootstrap=100), "cpu", seed=1)


def test_all_held_out_quotes_are_scored_and_of_too_many_some_from_everywhere(tokens):
    everything = [list(ids) for ids in load_split(tokens, "holdout")["input_ids"]]
    assert held_out(tokens, 500) == everything
    few = held_out(tokens, 3)
    assert few[0] == everything[0] and few[-1] == everything[-1] and len(few) == 3


def test_bytes_are_those_of_the_text_without_begin_and_end(base, tokens):
    sequences = held_out(tokens, 500)
    assert text_bytes(sequences, base, tokens) == sum(len(t.encode()) for t in load_split(tokens, "holdout")["text"])


def test_the_tuned_row_is_its_own_yardstick(base, board):
    board.torch_row("tuned", base, board.tuned_model)
    row = board.rows[-1]
    assert (row.ppl_ratio.value, row.kl_mean, row.same_top) == (1, 0, 1)
    assert row.bits_per_weight == pytest.approx(32, rel=0.01)
    assert row.perplexity.low <= row.perplexity.value <= row.perplexity.high


def test_a_model_with_other_weights_is_told_apart_from_the_tuned_one(base, board):
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    for module in block_matrices(model).values():
        weight_of(module).normal_(std=1, generator=torch.Generator().manual_seed(0))
    board.torch_row("damaged", base, model)
    row = board.rows[-1]
    assert row.kl_mean > 0.01 and row.same_top < 0.5
    assert not row.ppl_ratio.low <= 1 <= row.ppl_ratio.high  # random weights: other, not worse


def test_zeros_are_counted_in_the_block_matrices_only(base):
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model.transformer.wte.weight.data.zero_()
    assert zeros_of(model) == 0
    first = weight_of(next(iter(block_matrices(model).values())))
    first.zero_()
    total = sum(weight_of(module).numel() for module in block_matrices(model).values())
    assert zeros_of(model) == first.numel() / total


@pytest.fixture
def fresh(board):
    """The same quotes and the same tuned model, without rows."""
    empty = copy.copy(board)
    empty.rows, empty.by_hash = [], {}
    return empty


@pytest.fixture
def scored(monkeypatch, fresh):
    """Files that llama.cpp was asked to score, in order; it predicts what the tuned model predicts."""
    paths = []

    def logits(tools, path, sequences):
        paths.append(path.name)
        return iter(fresh.reference)

    monkeypatch.setattr(stage, "gguf_logits", logits)
    return paths


def file_of(name, sha256, kind="Q2_K"):
    return GgufFile(Path(name), sha256, 70_700_000, kind, {"bits_per_weight": 4.43, "zeros": 0.25})


TOOLS = SimpleNamespace(version="1.0")


def test_a_files_row_has_its_name_its_type_and_its_own_figures(fresh, scored):
    fresh.gguf_row("finished", file_of("a-Q2_K.gguf", "1"), TOOLS)
    (row,) = fresh.rows
    assert (row.stage, row.file, row.type, row.engine) == ("finished", "a-Q2_K.gguf", "Q2_K", "llama.cpp 1.0, cpu")
    assert (row.size_bytes, row.bits_per_weight, row.zeros) == (70_700_000, 4.43, 0.25)
    assert (row.ppl_ratio.value, row.same_top) == (1, 1)


def test_a_file_that_a_step_left_as_it_was_is_not_scored_again(fresh, scored):
    for step, name, sha256 in (("quantized", "a", "1"), ("finished", "a", "1"), ("quantized", "b", "2")):
        fresh.gguf_row(step, file_of(name, sha256), TOOLS)
    fresh.gguf_row("finished", file_of("b", "3"), TOOLS)
    assert scored == ["a", "b", "b"]
    assert [(row.stage, row.file) for row in fresh.rows] == [
        ("quantized", "a"),
        ("finished", "a"),
        ("quantized", "b"),
        ("finished", "b"),
    ]
    assert replace(fresh.rows[1], stage="quantized") == fresh.rows[0]


def test_the_ledger_has_a_row_for_each_step_and_two_for_each_quantized_file(base, tokens, tmp_path, monkeypatch):
    """The steps alone; the chain of test_job.py scores real files."""
    added = []
    monkeypatch.setattr(Scoreboard, "torch_row", lambda self, stage, *_: added.append((stage, None)))
    monkeypatch.setattr(Scoreboard, "gguf_row", lambda self, stage, file, tools: added.append((stage, file.type)))
    monkeypatch.setattr(stage.llama_cpp, "bench", lambda tools, path: llama_cpp.Speed(1.0, 2.0, 3))
    monkeypatch.setattr(stage, "write", lambda file, *_: {"of": file.path.name})
    f16 = replace(file_of("m-F16.gguf", "f", "F16"), facts={"metadata": {"context_length": 1024}})
    before, after = (
        GgufSet((file_of("m-Q2_K.gguf", n), replace(f16, path=Path("m-F16.gguf")), file_of("m-Q8_0.gguf", n, "Q8_0")))
        for n in "12"
    )
    cfg, calibration = EvaluateConfig(bootstrap=100), calibration_in(tmp_path, [[1, 2, 3], [4, 5, 6]])
    more = {"tools": TOOLS, "device": "cpu", "seed": 1, "out": tmp_path}
    files = (f16, before, after)
    found = evaluate(base, base, base, base, *files, tokens, calibration, cfg, FourbitConfig(enabled=False), **more)
    assert added == [
        *((stage, None) for stage in ("base", "tuned", "pruned", "recovered")),
        ("F16", "F16"),
        ("quantized", "Q2_K"),
        ("finished", "Q2_K"),
        ("quantized", "Q8_0"),
        ("finished", "Q8_0"),
    ]
    assert (
        list(found.facts["speed"]) == list(found.facts["generations"]) == ["m-Q2_K.gguf", "m-F16.gguf", "m-Q8_0.gguf"]
    )
    assert found.facts["nf4"]["reason"] == "fourbit.enabled is false"
    assert found.facts["long_context"]["value"] is None
    assert json.loads(found.path.read_text()) == found.facts
