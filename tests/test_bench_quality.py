"""That the benchmarks still run: every way is a job's settings, and every step of the prose bench works on a toy."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import quality_prose
from quality_chain import WAYS
from quality_prose import OURS, Bench, Effort, minutes_and_losses, steps

from pipeline import ledger
from pipeline.settings import resolve


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_compressing_is_a_jobs_settings(way):
    assert resolve(WAYS[way], {}).config


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Without its text and its model, which are large: a Llama of two blocks on random tokens."""
    monkeypatch.setattr(quality_prose, "WINDOW", 16)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
                         tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    bench = Bench.__new__(Bench)
    bench.folder, bench.device, bench.precision = tmp_path, "cpu", "fp32"
    bench.effort, bench.rows = Effort(recover_steps=2, finish_steps=2, batch_tokens=32), []
    windows = torch.randint(300, (24, 16), generator=torch.Generator().manual_seed(1)).tolist()
    bench.validation, bench.train, bench.held_out = windows[:4], windows[4:16], windows[16:]
    bench.fitted, bench.draws = bench.train, ledger.resample(8, 50, seed=0)
    bench.dense = bench.nats(bench.load("dense"))
    return bench


@pytest.mark.slow
def test_every_step_of_the_prose_bench_makes_a_row_and_is_not_done_again(bench, monkeypatch):
    rows = steps(bench)
    assert {*OURS, "random", "magnitude", "wanda", "sparsegpt"} < {row["step"] for row in rows}
    assert all(np.isfinite(row["ppl_ratio"]["value"]) and row["seconds"] > 0 for row in rows)
    zeros = {row["step"]: row["zeros"] for row in rows}
    assert all(zeros[step] == pytest.approx(0.5, abs=1e-3) for step in ("random", "sparsegpt", "refit", "recovered"))
    assert zeros["finished"] < 0.4  # Q2_K's matrices have none
    minutes, names, losses = zip(*minutes_and_losses(rows), strict=True)
    assert list(minutes) == sorted(minutes) and set(names) == {"recovered", "finished"} and min(losses) > 0
    bench.rows = []
    monkeypatch.setattr(bench, "load", None)
    assert steps(bench) == rows and json.dumps(rows)
    assert {field.name for field in fields(Effort)} == set(vars(bench.effort))
