"""Several processes that train as one, started by torchrun on this machine, without a GPU."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pipeline import signals
from pipeline.artifacts import Checkpoint
from pipeline.checkpoints import Checkpoints
from pipeline.config import NodesConfig, ResumeConfig, TrainConfig
from pipeline.errors import CheckFailed, ConfigError, MachineError
from pipeline.finetune import finetune
from pipeline.team import Team, free_port, processes_of_a_node
from pipeline.team.launcher import Place, launch
from pipeline.team.lesson import FACTS, Keeping, Lesson
from pipeline.team.verdict import DONE
from tests.test_finetune import END, LONGER, QUOTES, dataset

RECIPE = {"epochs": 2, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-2}
VALIDATION = [[END, 9, 9, 9, END], [END, 1, 22, 2, 3, END], [END, 1, 30, END]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Without dropout, whose masks are another process's own."""
    path = tmp_path_factory.mktemp("tiny-gpt2")
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**shape, **dropout, bos_token_id=END, eos_token_id=END)
    GPT2LMHeadModel(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text("{}")
    return Checkpoint.of(path, {})


@pytest.fixture
def tokens(tmp_path):
    return dataset(tmp_path / "tokens", validation=VALIDATION)


def tune(base, tokens, folder, processes=1, checkpoints=None, **settings):
    folder.mkdir(exist_ok=True)
    cfg = TrainConfig(**{**RECIPE, **settings})
    with Team(NodesConfig(processes=processes)) as team:
        return finetune(base, tokens, cfg, device="cpu", seed=1, out=folder, team=team, checkpoints=checkpoints)


def predictions(checkpoint):
    """Log-probabilities. Weights differ where that does not matter: in biases of keys, whose gradient is noise."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits.log_softmax(-1) for ids in QUOTES + LONGER]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_train_to_the_result_of_one(base, tokens, tmp_path, method):
    settings = {"method": method, "select_best": True, "lora_dropout": 0.0}
    one = tune(base, tokens, tmp_path / "one", **settings)
    two = tune(base, tokens, tmp_path / "two", 2, **settings)
    for ours, theirs in zip(predictions(one), predictions(two), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert two.facts["processes"] == 2 and two.facts["accumulation"] * 2 == one.facts["accumulation"] == 2
    for figure in ("steps", "epochs", "best_step", "trainable_parameters"):
        assert one.facts[figure] == two.facts[figure]
    for curve in ("loss_history", "heldout_loss", "validation_loss"):
        losses = [[point["loss"] for point in each.facts[curve]] for each in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["model", "tensorboard"]
    assert list((tmp_path / "two" / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_two_processes_go_on_from_their_checkpoint_to_the_same_bits(base, tokens, tmp_path, caplog):
    """Each with random states of its own, so there is dropout."""
    caplog.set_level(logging.INFO)
    cfg = ResumeConfig(minutes=0, steps=2)
    settings = {"method": "lora", "lora_dropout": 0.3, "max_steps": 5}
    kept = Checkpoints(tmp_path / "kept", cfg)
    whole = tune(base, tokens, tmp_path / "whole", 2, kept, **settings)
    assert "kept: checkpoint at step 4" in caplog.text  # a line of another process
    states = {path.name for path in kept.at(4).rglob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    again = tune(base, tokens, tmp_path / "again", 2, kept, **settings)
    assert again.facts["resumed"] == 4
    assert whole.sha256 == again.sha256
    assert whole.facts["loss_history"] == again.facts["loss_history"]


@pytest.mark.slow
def test_a_killed_process_ends_the_attempt_and_the_next_goes_on(base, tokens, tmp_path):
    cfg = ResumeConfig(minutes=0, steps=3)
    kept = Checkpoints(tmp_path / "kept", cfg)
    threading.Thread(target=kill_a_process, args=(tmp_path / "out", kept.folder), daemon=True).start()
    with pytest.raises(MachineError, match="ended without a word"):
        tune(base, tokens, tmp_path / "out", 2, kept, max_steps=5_000)
    assert not processes_below(tmp_path)
    resumed_at = int(kept.newest().name.removeprefix("step-"))
    again = tune(base, tokens, tmp_path / "out", 2, Checkpoints(kept.folder, cfg), max_steps=resumed_at + 2)
    assert again.facts["resumed"] == resumed_at and again.facts["steps"] == resumed_at + 2


@pytest.mark.slow
def test_a_signal_has_all_processes_save_and_end(base, tokens, tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path / "kept", ResumeConfig())
    monkeypatch.setattr(signals.state, "received", None)

    def when_it_trains():
        wait_for(lambda: list((tmp_path / "out").rglob("tensorboard/events*")))
        time.sleep(1)
        signals.state.received = signal.SIGTERM

    threading.Thread(target=when_it_trains, daemon=True).start()
    with pytest.raises(signals.Stopped):
        tune(base, tokens, tmp_path / "out", 2, kept, max_steps=5_000)
    assert kept.newest() and not processes_below(tmp_path)


@pytest.mark.slow
def test_what_a_process_refuses_is_what_the_job_says(base, tokens, tmp_path):
    spoilt = Checkpoint(shutil.copytree(base.path, tmp_path / "spoilt"), "", {})
    weights = load_file(spoilt.path / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.bias"][0] = torch.nan
    save_file(weights, spoilt.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckFailed, match="so training cannot go on; try a lower"):
        tune(spoilt, tokens, tmp_path / "out", 2)


@pytest.mark.slow
def test_two_machines_with_two_processes_each_go_on_from_a_checkpoint_that_the_first_has(base, tokens, tmp_path):
    keeping = Keeping(tmp_path / "kept", ResumeConfig(minutes=0, steps=1), "kept", None, "")

    def both_train(out, steps):
        cfg = TrainConfig(**{**RECIPE, "batch_size": 1, "accumulation": 4, "max_steps": steps})
        lesson = Lesson(base, tokens, cfg, 1, "cpu", 1, tmp_path / out, keeping).as_json()
        places = [Place(2, rank, 2, "127.0.0.1", port, out) for rank in (0, 1)]
        folders = [tmp_path / f"{out}-machine-{place.rank}" for place in places]
        with ThreadPoolExecutor(2) as machines:
            verdicts = machines.map(lambda place, folder: launch(lesson, folder, place, lambda: None), places, folders)
            assert list(verdicts) == [DONE, DONE]
        return json.loads((folders[0] / FACTS).read_text())

    port = free_port()
    assert both_train("first", 3)["resumed"] == 0
    shutil.rmtree(tmp_path / "first-machine-1")
    facts = both_train("again", 4)
    assert facts["resumed"] == 2 and facts["processes"] == 4 and facts["steps"] == 4
    assert (tmp_path / "again-machine-1" / "checkpoint" / "step-00000002").is_dir()


@pytest.mark.parametrize(
    ("batch", "accumulation", "count", "gpus", "found"),
    [(4, 4, 1, 0, 1), (4, 4, 1, 8, 8), (4, 4, 2, 8, 8), (4, 4, 1, 3, 2), (4, 3, 3, 8, 4), (1, 1, 1, 4, 1)],
)
def test_a_steps_examples_are_shared_equally(batch, accumulation, count, gpus, found):
    train = TrainConfig(batch_size=batch, accumulation=accumulation)
    assert processes_of_a_node(train, NodesConfig(count=count), gpus) == found


@pytest.mark.parametrize(
    ("settings", "gpus", "sentence"),
    [
        ({"count": 3}, 0, "3 processes cannot have equal shares of a step's 16 examples"),
        ({"processes": 3}, 4, "3 processes cannot have equal shares"),
        ({"processes": 4}, 2, "nodes.processes is 4, but 2 GPUs are visible"),
    ],
)
def test_shares_that_cannot_be_equal_are_refused(settings, gpus, sentence):
    with pytest.raises(ConfigError, match=sentence):
        processes_of_a_node(TrainConfig(), NodesConfig(**settings), gpus)


def test_one_gpu_has_nothing_to_shard_over():
    with pytest.raises(ConfigError, match="only one GPU trains"):
        processes_of_a_node(TrainConfig(sharding="full"), NodesConfig(), 1)


def kill_a_process(out, kept):
    """The second one, once there is a checkpoint."""
    wait_for(lambda: list(kept.glob("step-*")))
    found = []
    wait_for(lambda: found.extend(pid for pid in processes_below(out.parent) if rank_of(pid) == "1") or found)
    os.kill(found[0], signal.SIGKILL)


def rank_of(pid):
    return (told_by(lambda: psutil.Process(pid).environ()) or {}).get("RANK")


def processes_below(folder):
    """Training processes with a lesson there."""
    return [each.pid for each in psutil.process_iter() if str(folder) in " ".join(told_by(each.cmdline) or [])]


def told_by(ask):
    """A process may have ended meanwhile."""
    try:
        return ask()
    except psutil.Error:
        return None


def wait_for(there, seconds=1200):
    end = time.monotonic() + seconds
    while not there() and time.monotonic() < end:
        time.sleep(0.05)
