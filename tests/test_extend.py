import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline import extend as stage
from pipeline import signals
from pipeline.artifacts import Calibration, Checkpoint
from pipeline.checkpoints import Checkpoints
from pipeline.config import ExportConfig, ResumeConfig
from pipeline.device import Precision
from pipeline.errors import CheckFailed, ConfigError
from pipeline.extend import extend, hats, summed_loss, with_context
from scripts.make_random_gpt2 import make
from tests.test_distill import Died

WPE = "transformer.wpe.weight"
CONTEXT = 200


@pytest.fixture(scope="module")
def small(gpt2_vocab, tmp_path_factory):
    path = make(tmp_path_factory.mktemp("small") / "m", gpt2_vocab, layers=1, width=32, heads=2, positions=64)
    return Checkpoint.of(path, {})


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "calibration.jsonl"
    rows = [
        {"split": "validation" if n < 4 else "train", "kind": "quotes", "ids": [50256, *range(n, n + 12), 50256]}
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Calibration(path, "0" * 64)


def run(small, calibration, out, steps=0, seed=0, checkpoints=None):
    cfg = ExportConfig(context=CONTEXT, context_steps=steps)
    return extend(small, calibration, cfg, device="cpu", seed=seed, out=out, checkpoints=checkpoints)


@pytest.fixture(scope="module")
def trained(small, calibration, tmp_path_factory):
    return run(small, calibration, tmp_path_factory.mktemp("trained"), steps=8)


def tensors(checkpoint):
    return load_file(checkpoint.path / "model.safetensors")


def test_training_the_new_rows_changes_no_other_bit(small, trained):
    before, after = tensors(small), tensors(trained)
    assert after.keys() == before.keys()
    assert torch.equal(after[WPE][:64], before[WPE])
    assert len(after[WPE]) == AutoConfig.from_pretrained(trained.path).n_positions == CONTEXT
    assert all(torch.equal(after[name], before[name]) for name in before if name != WPE)
    assert (trained.path / "tokenizer.json").read_bytes() == (small.path / "tokenizer.json").read_bytes()


def test_training_lowers_the_loss_far_back_and_says_by_how_much(trained):
    assert trained.facts["kept"]
    assert trained.facts["loss"] < trained.facts["loss_before"]
    assert len(trained.facts["loss_history"]) == trained.facts["steps"] == 8


def test_the_fill_that_predicts_best_is_taken(small, calibration, tmp_path):
    facts = run(small, calibration, tmp_path).facts
    assert (facts["positions"], facts["context"]) == (64, CONTEXT)
    assert facts["loss_by_fill"].keys() == stage.FILLS.keys()
    assert facts["loss_by_fill"][facts["fill"]] == facts["loss"] == min(facts["loss_by_fill"].values())


def test_the_same_seed_gives_the_same_rows(small, calibration, trained, tmp_path):
    assert run(small, calibration, tmp_path, steps=8).sha256 == trained.sha256


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_training_that_is_cut_off_in_any_step_ends_in_the_same_rows(
    how, small, calibration, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(signals.state, "received", None)
    backward = stage.backward
    for last in (1, 4, 7):

        def cut_off(model, positions, train, context, seed, last=last):
            if seed == last - 1 and how == "stopped":
                signals.state.received = signal.SIGTERM
            if seed == last and how == "killed":
                raise Died
            return backward(model, positions, train, context, seed)

        kept = Checkpoints(tmp_path / f"kept-{last}", ResumeConfig(steps=1 if how == "killed" else 0))
        with monkeypatch.context() as patch:
            patch.setattr(stage, "backward", cut_off)
            with pytest.raises(Died if how == "killed" else signals.Stopped):
                run(small, calibration, tmp_path / "died", steps=8, checkpoints=kept)
        signals.state.received = None
        again = run(small, calibration, tmp_path / f"again-{last}", steps=8, checkpoints=kept)
        assert again.facts == trained.facts | {"resumed": last} and again.sha256 == trained.sha256


def test_rows_that_training_made_worse_are_put_back(small, calibration, tmp_path, monkeypatch):
    losses = iter((1.0, 2.0, 2.0, 3.0, 3.0))  # of three fills, before training, after it
    monkeypatch.setattr(stage, "loss_of", lambda model, checks: next(losses))
    worse = run(small, calibration, tmp_path / "worse", steps=2)
    assert not worse.facts["kept"]
    assert worse.facts["loss"] == worse.facts["loss_before"] == 3.0
    monkeypatch.setattr(stage, "loss_of", lambda model, checks: 1.0)
    plain = run(small, calibration, tmp_path / "plain")
    assert plain.facts["fill"] == worse.facts["fill"] == "steady"
    assert torch.equal(tensors(worse)[WPE], tensors(plain)[WPE])


def test_a_single_position_can_be_added(small, calibration, tmp_path):
    cfg = ExportConfig(context=65, context_steps=1)
    longer = extend(small, calibration, cfg, device="cpu", seed=0, out=tmp_path)
    assert torch.equal(tensors(longer)[WPE][:64], tensors(small)[WPE])


def test_the_checked_windows_end_among_the_new_positions_in_the_same_text(calibration):
    train, validation = (stage.load_calibration(calibration, split) for split in ("train", "validation"))
    half, full = stage.check_windows(train, validation, 64, CONTEXT, seed=0)
    assert (len(half.ids), len(full.ids)) == (132, 200)
    assert half.tokens == full.tokens == 52
    assert len(half.ids) - half.tokens >= 64
    assert half.ids[-52:] == full.ids[-52:] == [token for ids in validation for token in ids[1:]]


def test_a_chunked_loss_is_the_whole_one_and_has_its_gradient(trained, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(trained.path, dtype=torch.float32).eval()
    ids = list(range(300, 300 + CONTEXT))
    table = model.transformer.wpe.weight
    whole = torch.nn.functional.cross_entropy(
        model(torch.tensor([ids])).logits[0, 99:-1], torch.tensor(ids[100:]), reduction="sum"
    )
    (slow,) = torch.autograd.grad(whole, table)
    monkeypatch.setattr(stage, "CHUNK", 7)
    monkeypatch.setattr(stage, "arithmetic_of", lambda *asked: Precision("fp32", "for the comparison"))
    loss = summed_loss(model, ids, 100)
    (fast,) = torch.autograd.grad(loss, table)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-5)


def test_hats_give_each_row_shares_that_add_up_and_knots_their_own_row():
    shares = hats(129, 64)
    assert shares.shape == (129, 3)
    assert torch.allclose(shares.sum(1), torch.ones(129))
    assert shares[[0, 64, 128]].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert shares[32].tolist() == [0.5, 0.5, 0]
    assert hats(10, 64).shape == (10, 2)


def test_dropout_is_off_while_training_and_as_it_was_afterwards(small):
    model = AutoModelForCausalLM.from_pretrained(small.path, dtype=torch.float32).eval()
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert any(rates)
    ids = torch.arange(50)[None]
    still = model(ids).logits
    with stage.little_memory(model):
        assert torch.equal(model(ids).logits, still)
    assert rates == [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert not model.training


def test_a_context_that_shrinks_the_table_or_finds_none_is_refused(small, calibration, tmp_path):
    with pytest.raises(ConfigError, match="would shrink"):
        extend(small, calibration, ExportConfig(context=63), device="cpu", seed=0, out=tmp_path)
    config = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="whose 64 positions are rotary"):
        with_context(tmp_path / "llama", CONTEXT, tmp_path / "out")


def test_a_model_that_is_not_finite_far_back_is_a_failed_check(small, calibration, tmp_path):
    broken = with_context(small.path, 65, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights[WPE][60] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match="the loss behind 133 tokens is nan"):
        run(Checkpoint.of(broken, {}), calibration, tmp_path / "out")


def test_a_checkpoint_that_is_long_enough_is_not_copied(small, trained, tmp_path):
    assert with_context(trained.path, CONTEXT, tmp_path) == trained.path
    assert with_context(small.path, 0, tmp_path) == small.path
    assert list(Path(tmp_path).iterdir()) == []
    assert AutoConfig.from_pretrained(with_context(small.path, CONTEXT, tmp_path)).n_positions == CONTEXT
