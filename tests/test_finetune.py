import json
import math
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pipeline import finetune as module
from pipeline import signals
from pipeline.artifacts import Checkpoint, TokenDataset
from pipeline.checkpoints import Checkpoints
from pipeline.collate import collate
from pipeline.config import ResumeConfig, TrainConfig
from pipeline.errors import CheckFailed, ConfigError
from pipeline.finetune import finetune
from pipeline.mirror import Mirror
from pipeline.tokens import SCHEMA
from pipeline.trainer import QuoteTrainer
from tests.conftest import ROOT

END = 63
QUOTES = [[END, 1, 20 + i, 2, 3, END] for i in range(12)]
LONGER = [[END, 1, 20, *range(10 + i, 40 + i), END] for i in range(3)]
CONTRARY = [[END, 9, 9, 9, 9, 9]]  # the better the training quotes are learned, the worse this is predicted


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small are done before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """GPT-2 with a vocabulary of 64, because the embedding is what costs time; its tokenizer is only passed on."""
    path = tmp_path_factory.mktemp("tiny-gpt2")
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=END, eos_token_id=END)).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text(f'{{"name": "{name}"}}')
    return Checkpoint.of(path, {})


def dataset(path, train=QUOTES, validation=(), holdout=QUOTES[:3] + LONGER):
    path.mkdir()
    for split, rows in {"train": train, "validation": validation, "holdout": holdout}.items():
        table = [{"input_ids": ids, "text": "", "source": "", "truncated": False} for ids in rows]
        with pa.ipc.new_stream(str(path / f"{split}.arrow"), SCHEMA) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist(table, schema=SCHEMA))
    return TokenDataset(path, "", END, END)


@pytest.fixture
def tokens(tmp_path):
    return dataset(tmp_path / "tokens")


def tune(base, tokens, folder, seed=1, checkpoints=None, **settings):
    folder.mkdir(exist_ok=True)
    return finetune(base, tokens, TrainConfig(**settings), device="cpu", seed=seed, out=folder, checkpoints=checkpoints)


def load(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


def ends_after(model, ids):
    """Probability that the model stops after `ids`."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].softmax(-1)[END].item()


def heldout_loss(model, rows):
    losses = []
    for ids in rows:
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        losses += (-scores[range(len(ids) - 1), ids[1:]]).tolist()
    return sum(losses) / len(losses)


def test_training_lowers_the_loss_learns_to_stop_and_says_what_it_did(base, tokens, tmp_path):
    tuned = tune(base, tokens, tmp_path / "out", epochs=4, learning_rate=1e-2, batch_size=4, accumulation=1)
    model, facts = load(tuned), tuned.facts
    assert facts["steps"] == facts["planned_steps"] == 12 and facts["epochs"] == 4
    assert facts["loss_history"][-1]["loss"] < facts["loss_history"][0]["loss"] - 1
    assert [entry["epoch"] for entry in facts["heldout_loss"]] == [1, 2, 3, 4]
    assert ends_after(model, QUOTES[0][:-1]) > 10 * ends_after(load(base), QUOTES[0][:-1])
    assert facts["trainable_parameters"] == facts["total_parameters"] == model.num_parameters()
    assert facts["tokens_per_second"] > 0 and facts["precision"] == "fp32"
    json.dumps(facts, allow_nan=False)


def test_the_heldout_loss_is_the_mean_over_tokens_of_the_saved_model(base, tokens, tmp_path):
    tuned = tune(base, tokens, tmp_path / "out", max_steps=2, batch_size=2)
    expected = heldout_loss(load(tuned), QUOTES[:3] + LONGER)
    assert tuned.facts["heldout_loss"][-1]["loss"] == pytest.approx(expected, abs=1e-4)


def test_the_saved_model_is_whole(base, tokens, tmp_path):
    tuned = tune(base, tokens, tmp_path / "out", max_steps=1)
    weights = load_file(tuned.path / "model.safetensors")
    assert "lm_head.weight" not in weights  # tied
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tuned.path / name).read_bytes() == (base.path / name).read_bytes()
    assert json.loads((tuned.path / "config.json").read_text())["use_cache"] is True
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model", "tensorboard"]
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_seed_decides_the_result_to_the_bit(method, base, tokens, tmp_path):
    settings = {"method": method, "max_steps": 2, "learning_rate": 1e-3}
    first, again, other = (
        tune(base, tokens, tmp_path / name, seed=seed, **settings)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first.sha256 == again.sha256 != other.sha256


def test_a_loss_that_is_not_finite_stops_the_job(base, tokens, tmp_path, monkeypatch):
    original = module.load_dense

    def poisoned(checkpoint):
        model = original(checkpoint)
        model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = math.inf
        return model

    monkeypatch.setattr(module, "load_dense", poisoned)
    with pytest.raises(CheckFailed, match=r"at step \d+ of 40.*train\.learning_rate \(now"):
        tune(base, tokens, tmp_path / "out", max_steps=40)
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_train_little_and_leave_a_dense_model(method, base, tokens, tmp_path):
    tuned = tune(
        base, tokens, tmp_path / "out", method=method, epochs=3, learning_rate=1e-2, accumulation=1, lora_rank=2
    )
    model = load(tuned)
    assert tuned.facts["trainable_parameters"] < 0.1 * model.num_parameters()
    assert tuned.facts["total_parameters"] == model.num_parameters()
    assert tuned.facts["heldout_loss"][-1]["loss"] < tuned.facts["heldout_loss"][0]["loss"]
    rows = QUOTES[:3] + LONGER
    assert tuned.facts["heldout_loss"][-1]["loss"] == pytest.approx(heldout_loss(model, rows), abs=1e-3)
    assert set(load_file(tuned.path / "model.safetensors")) == set(load_file(base.path / "model.safetensors"))


def test_the_best_epoch_is_kept_when_asked_for(base, tmp_path):
    tokens = dataset(tmp_path / "tokens", validation=CONTRARY)
    settings = {"epochs": 3, "learning_rate": 1e-2, "batch_size": 4, "accumulation": 1}
    last = tune(base, tokens, tmp_path / "last", **settings)
    losses = [entry["loss"] for entry in last.facts["validation_loss"]]
    assert min(losses) < losses[-1]
    best = tune(base, tokens, tmp_path / "best", select_best=True, **settings)
    assert heldout_loss(load(best), CONTRARY) == pytest.approx(min(losses), abs=1e-4)
    assert best.facts["best_step"] == 3 * (1 + losses.index(min(losses)))
    assert not (tmp_path / "best" / "trainer").exists()


def test_early_stopping_stops_and_is_no_unfinished_training(base, tmp_path):
    tokens = dataset(tmp_path / "tokens", validation=CONTRARY)
    settings = {"epochs": 9, "learning_rate": 1e-2, "batch_size": 4, "accumulation": 1}
    tuned = tune(base, tokens, tmp_path / "out", early_stopping=1, **settings)
    assert tuned.facts["steps"] < tuned.facts["planned_steps"] == 27


def test_training_that_ends_early_without_a_reason_is_an_error(base, tokens, tmp_path, monkeypatch):
    class Stops(module.QuoteTrainer):
        def training_step(self, *arguments, **more):
            self.control.should_training_stop = True
            return super().training_step(*arguments, **more)

    monkeypatch.setattr(module, "QuoteTrainer", Stops)
    with pytest.raises(CheckFailed, match=r"ended at step \d of 5"):
        tune(base, tokens, tmp_path / "out", max_steps=5)


def test_out_of_gpu_memory_makes_the_batch_smaller_and_keeps_the_recipe(base, tokens, tmp_path, monkeypatch):
    tried = []

    class Small(module.QuoteTrainer):
        def training_step(self, model, inputs, *more):
            tried.append(len(inputs["input_ids"]))
            if tried[-1] > 2:
                raise torch.cuda.OutOfMemoryError
            return super().training_step(model, inputs, *more)

    monkeypatch.setattr(module, "QuoteTrainer", Small)
    tuned = tune(base, tokens, tmp_path / "out", max_steps=1, batch_size=6, accumulation=2)
    assert tried == [6, 3, *[1] * 12]
    assert (tuned.facts["batch_size"], tuned.facts["accumulation"]) == (1, 12)


def test_out_of_gpu_memory_with_one_example_is_a_setting_to_change(base, tokens, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(module.QuoteTrainer, "training_step", full)
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing"):
        tune(base, tokens, tmp_path / "out", batch_size=2)


def test_padding_changes_no_prediction(base):
    model = load(base)
    alone = model(**collate([{"input_ids": QUOTES[0]}])).loss
    both = collate([{"input_ids": QUOTES[0]}, {"input_ids": LONGER[0]}])
    scores = model(input_ids=both["input_ids"], attention_mask=both["attention_mask"]).logits[0]
    padded = torch.nn.functional.cross_entropy(scores[:-1], both["labels"][0, 1:])
    assert padded.item() == pytest.approx(alone.item(), abs=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_changes_the_memory_not_the_result(method, base, tokens, tmp_path):
    settings = {"method": method, "max_steps": 1, "learning_rate": 1e-3, "lora_dropout": 0}
    plain = load(tune(base, tokens, tmp_path / "plain", **settings))
    saving = load(tune(base, tokens, tmp_path / "saving", gradient_checkpointing=True, **settings))
    for name, weight in plain.state_dict().items():
        assert torch.allclose(weight, saving.state_dict()[name], atol=1e-5), name


class Died(BaseException):
    """What no handler of the library catches."""


def die_before(step, patch, how):
    class Dies(QuoteTrainer):
        def training_step(self, *arguments, **more):
            if self.state.global_step + 1 == step:
                how()
            return super().training_step(*arguments, **more)

    patch.setattr(module, "QuoteTrainer", Dies)


def die():
    raise Died


def kept(folder, steps=1, mirror=None):
    return Checkpoints(folder, ResumeConfig(steps=steps, minutes=0), mirror, "finetune/abc/training")


def interrupted(base, tokens, folder, before, steps=1, mirror=None, **settings):
    """Trained until `before` and then, in a new folder, to the end."""
    with pytest.MonkeyPatch.context() as patch:
        die_before(before, patch, die)
        with pytest.raises(Died):
            tune(base, tokens, folder, checkpoints=kept(folder / "kept", steps, mirror), **settings)
    return tune(base, tokens, folder / "again", checkpoints=kept(folder / "kept", steps, mirror), **settings)


SHORT = {"epochs": 3, "batch_size": 5, "accumulation": 2, "learning_rate": 1e-2}  # 2 steps an epoch, the second smaller


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_that_died_before_any_step_ends_in_the_same_weights_to_the_bit(method, base, tokens, tmp_path):
    whole = tune(base, tokens, tmp_path / "whole", method=method, **SHORT)
    assert whole.facts["resumed"] == 0 and whole.facts["steps"] == 6
    for steps, befores in {1: range(1, 7), 4: [6], 7: [6]}.items():
        for before in befores:
            again = interrupted(base, tokens, tmp_path / f"{steps}-{before}", before, steps, method=method, **SHORT)
            assert again.facts["resumed"] == (before - 1) // steps * steps
            assert again.sha256 == whole.sha256, (steps, before)
            for same in ("loss_history", "heldout_loss", "steps", "epochs"):
                assert again.facts[same] == whole.facts[same], (same, steps, before)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_that_is_stopped_loses_no_step(method, base, tokens, tmp_path):
    whole = tune(base, tokens, tmp_path / "whole", method=method, **SHORT)
    for step in (1, 2, 5):
        seldom = Checkpoints(tmp_path / f"kept-{step}", ResumeConfig(minutes=60))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signals.state, "received", None)
            die_before(step, patch, lambda: setattr(signals.state, "received", signal.SIGTERM))
            with pytest.raises(signals.Stopped):
                tune(base, tokens, tmp_path / "out", method=method, checkpoints=seldom, **SHORT)
        again = tune(base, tokens, tmp_path / f"again-{step}", method=method, checkpoints=seldom, **SHORT)
        assert again.facts["resumed"] == step and again.sha256 == whole.sha256
        assert again.facts["heldout_loss"] == whole.facts["heldout_loss"]


KILLED_TRAINING = """
import os, signal, sys
from pathlib import Path
from tests.test_finetune import *
base, tokens, out, method, before = sys.argv[1:]
torch.set_num_threads(1)
die_before(int(before), pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGKILL))
tokens = TokenDataset(Path(tokens), "", END, END)
tune(Checkpoint.of(Path(base), {}), tokens, Path(out), checkpoints=kept(Path(out) / "kept"), method=method, **SHORT)
"""


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_process_that_was_killed_goes_on_to_the_same_weights(method, base, tokens, tmp_path):
    whole = tune(base, tokens, tmp_path / "whole", method=method, **SHORT)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_TRAINING, base.path, tokens.path, out, method, "4"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert not (out / "model").exists()
    again = tune(base, tokens, out, checkpoints=kept(out / "kept"), method=method, **SHORT)
    assert again.facts["resumed"] == 3 and again.sha256 == whole.sha256


def test_a_checkpoint_holds_no_pickle_but_optimizer_and_random_states(base, tokens, tmp_path):
    interrupted(base, tokens, tmp_path / "out", 4, method="full", **SHORT)
    folders = list((tmp_path / "out" / "kept").iterdir())
    assert len(folders) == 2
    for folder in folders:
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert {name for name in names if not name.endswith((".json", ".safetensors"))} == {
            *("trainer/optimizer.pt", "trainer/scheduler.pt", "trainer/rng_state.pth")
        }
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(folder / "trainer" / name, weights_only=True)


@pytest.mark.parametrize("before", [3, 4, 5, 6])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_best_epoch_survives_a_death_even_on_another_disk(before, method, base, tmp_path):
    tokens = dataset(tmp_path / "tokens", validation=CONTRARY)
    settings = {**SHORT, "select_best": True, "method": method}
    whole = tune(base, tokens, tmp_path / "whole", **settings)
    assert whole.facts["best_step"] == 2
    mirror = Mirror(str(tmp_path / "bucket"), "run")
    with pytest.MonkeyPatch.context() as patch:
        die_before(before, patch, die)
        here = kept(tmp_path / "kept", mirror=mirror)
        with pytest.raises(Died):
            tune(base, tokens, tmp_path / "out", checkpoints=here, **settings)
        here.copying.join()
    there = kept(tmp_path / "elsewhere", mirror=mirror)
    again = tune(base, tokens, tmp_path / "new", checkpoints=there, **settings)
    assert again.facts["resumed"] == before - 1 and again.facts["best_step"] == 2
    assert again.sha256 == whole.sha256 and again.facts["validation_loss"] == whole.facts["validation_loss"]


@pytest.mark.parametrize("before", [4, 5, 6])
def test_early_stopping_goes_on_waiting_where_it_was(before, base, tmp_path):
    tokens = dataset(tmp_path / "tokens", validation=CONTRARY)
    settings = {**SHORT, "epochs": 9, "early_stopping": 2}
    whole = tune(base, tokens, tmp_path / "whole", **settings)
    assert whole.facts["steps"] == 6  # the first of three epochs was the best
    again = interrupted(base, tokens, tmp_path / "out", before, **settings)
    assert again.facts["resumed"] == before - 1
    assert (again.sha256, again.facts["steps"]) == (whole.sha256, 6)


def test_an_interruption_is_not_taken_for_early_stopping(base, tmp_path, monkeypatch):
    class Stops(module.QuoteTrainer):
        def training_step(self, *arguments, **more):
            self.control.should_training_stop = True
            return super().training_step(*arguments, **more)

    monkeypatch.setattr(module, "QuoteTrainer", Stops)
    tokens = dataset(tmp_path / "tokens", validation=CONTRARY)
    with pytest.raises(CheckFailed, match=r"ended at step \d of 18"):
        tune(base, tokens, tmp_path / "out", **{**SHORT, "epochs": 9, "early_stopping": 9})


def test_a_torn_checkpoint_is_passed_over_and_the_weights_are_the_same(base, tokens, tmp_path, caplog):
    whole = tune(base, tokens, tmp_path / "whole", **SHORT)
    with pytest.MonkeyPatch.context() as patch:
        die_before(6, patch, die)
        with pytest.raises(Died):
            tune(base, tokens, tmp_path / "out", checkpoints=kept(tmp_path / "kept"), **SHORT)
    optimizer = tmp_path / "kept" / "step-00000005" / "trainer" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    again = tune(base, tokens, tmp_path / "out", checkpoints=kept(tmp_path / "kept"), **SHORT)
    assert again.facts["resumed"] == 4 and again.sha256 == whole.sha256
    assert caplog.text.count("passed over") == 1


def test_a_loss_that_was_not_logged_yet_is_not_lost(base, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOGGED_STEPS", 3)
    whole = tune(base, tokens, tmp_path / "whole", **SHORT)
    assert [entry["step"] for entry in whole.facts["loss_history"]] == [2, 4, 6]
    again = interrupted(base, tokens, tmp_path / "out", 4, **SHORT)
    assert again.facts["resumed"] == 3
    assert again.facts["loss_history"] == whole.facts["loss_history"]


def test_the_speed_after_going_on_counts_only_what_was_trained_since(base, tokens, tmp_path, monkeypatch):
    counted = []
    original = module.speed
    monkeypatch.setattr(module, "speed", lambda history, tokens: counted.append(tokens) or original(history, tokens))
    tune(base, tokens, tmp_path / "whole", **SHORT)
    interrupted(base, tokens, tmp_path / "out", 3, **SHORT)
    assert 3 * counted[1] == 2 * counted[0]  # two of three epochs
