"""That the benchmarks still run: every way is a job's settings, and every step of the prose bench works on toys."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench_quality
import quality_chain
import quality_prose
from quality_chain import DEFAULT, WAYS
from quality_prose import OURS, Bench, Effort, gpt2_type, minutes_and_losses, steps

from pipeline import ledger
from pipeline.matrices import block_matrices
from pipeline.settings import resolve


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_compressing_is_a_jobs_settings(way):
    assert resolve(WAYS[way], {}).config


@pytest.mark.parametrize(("size", "limit"), [(15_300_000, 14_000_000), (70_700_000, 65_000_000), (612_345, 560_000)])
def test_the_budget_is_below_the_size_of_the_default_whatever_the_model(size, limit, monkeypatch, tmp_path):
    """14 MB, the small model's, are less than any mix of types makes of GPT-2."""
    asked = []

    def run(name, settings, *where):
        asked.append((name, settings))
        return {"way": name, "size_bytes": size if name == DEFAULT else 1}

    monkeypatch.setattr(quality_chain, "run", run)
    rows = quality_chain.chain("gpt2", [], tmp_path, {"recover.steps": "5", "seed": "1"})
    assert [row["way"] for row in rows] == [*WAYS, f"the default, in {limit / 1e6:g} MB"]
    assert asked[-1][1]["quantize.max_bytes"] == str(limit)
    found = dict(asked)
    assert found[DEFAULT] == {"recover.steps": "5", "seed": "1"}
    assert found["refit, our encoder"]["recover.steps"] == "0"  # or it would not be what it is called


def test_a_hub_that_cannot_be_reached_is_one_sentence_and_its_code(monkeypatch, tmp_path):
    monkeypatch.setenv("BASE_MODEL", "openai-community/gpt2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = CliRunner().invoke(bench_quality.main, ["--part", "prose", "--work", str(tmp_path)])
    assert done.exit_code == 69 and done.stderr.startswith("bench_quality: ") and "Traceback" not in done.output


LLAMA = LlamaConfig(vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True)  # fmt: skip
GPT2 = GPT2Config(vocab_size=300, n_embd=256, n_layer=2, n_head=4, n_positions=32)


def test_gpt2_gets_the_types_that_its_own_file_has():
    types = {name: gpt2_type(name) for name in block_matrices(GPT2LMHeadModel(GPT2))}
    assert {name.split(".", 3)[3] for name, kind in types.items() if kind == "Q2_K"} == {"mlp.c_fc"}
    assert len(types) == 8 and set(types.values()) == {"Q2_K", "Q3_K"}


@pytest.fixture(params=[LLAMA, GPT2], ids=["llama", "gpt2"])
def bench(request, tmp_path, monkeypatch):
    """Without its text and its model, which are large: two blocks on random tokens."""
    monkeypatch.setattr(quality_prose, "WINDOW", 16)
    torch.manual_seed(0)
    kind = LlamaForCausalLM if request.param is LLAMA else GPT2LMHeadModel
    kind(request.param).save_pretrained(tmp_path / "dense")
    bench = Bench.__new__(Bench)
    bench.folder, bench.device, bench.precision = tmp_path, "cpu", "fp32"
    bench.effort, bench.rows = Effort(recover_steps=2, adapt_steps=2, finish_steps=2, batch_tokens=32), []
    windows = torch.randint(300, (24, 16), generator=torch.Generator().manual_seed(1)).tolist()
    bench.validation, bench.train, bench.held_out = windows[:4], windows[4:16], windows[16:]
    bench.fitted, bench.draws = bench.train, ledger.resample(8, 50, seed=0)
    bench.dense = bench.nats(bench.load("dense"))
    return bench


@pytest.mark.slow
def test_every_step_of_the_prose_bench_makes_a_row_and_is_not_done_again(bench, monkeypatch, capsys):
    rows = steps(bench)
    assert {*OURS, "random", "magnitude", "wanda", "sparsegpt"} < {row["step"] for row in rows}
    assert all(np.isfinite(row["ppl_ratio"]["value"]) and row["seconds"] > 0 for row in rows)
    zeros = {row["step"]: row["zeros"] for row in rows}
    assert all(zeros[step] == pytest.approx(0.5, abs=1e-3) for step in ("random", "sparsegpt", "refit", "recovered"))
    assert zeros["finished"] < 0.4  # Q2_K's matrices have none
    minutes, names, losses = zip(*minutes_and_losses(rows), strict=True)
    assert list(minutes) == sorted(minutes) and set(names) == {"recovered", "adapted", "finished"} and min(losses) > 0
    bench_quality.show_prose("a toy", rows)
    shown = capsys.readouterr().out
    assert "a toy, general prose" in shown and shown.count(" | 0% |") >= 3  # where each training begins
    bench.rows = []
    monkeypatch.setattr(bench, "load", None)
    assert steps(bench) == rows and json.dumps(rows)
    assert {field.name for field in fields(Effort)} == set(vars(bench.effort))
