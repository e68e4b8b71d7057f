import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.artifacts import Checkpoint, Corpus, Source, sha256_of
from pipeline.config import EvaluateConfig, TokensConfig
from pipeline.evaluate import Scoreboard, held_out, text_bytes, zeros_of
from pipeline.matrices import block_matrices, weight_of
from pipeline.tokens import load_split, tokenize

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
