import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import recover as stage
from pipeline.artifacts import Checkpoint
from pipeline.config import RecoverConfig
from pipeline.errors import CheckFailed
from pipeline.matrices import block_matrices, weight_of
from pipeline.recover import recover, require_zeros, zero_counts
from tests.calibrated import calibration_in
from tests.test_distill import TEXTS, Died, die_after, gpt2, kept, llama

CFG = RecoverConfig(steps=8, batch_tokens=32, learning_rate=1e-3, patience=9)


def saved(model, folder):
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return Checkpoint.of(folder, {})


@torch.no_grad()
def half_zero(model):
    """Half of each block matrix, the smaller half."""
    for module in block_matrices(model).values():
        weight = weight_of(module)
        weight *= weight.abs() > weight.abs().median()
    return model


@pytest.fixture(params=[gpt2, llama])
def models(request, tmp_path):
    """Tuned and pruned."""
    return saved(request.param(), tmp_path / "tuned"), saved(half_zero(request.param()), tmp_path / "pruned")


@pytest.fixture
def calibration(tmp_path):
    return calibration_in(tmp_path, TEXTS)


def weights(checkpoint):
    return load_file(checkpoint.path / "model.safetensors")


def run(models, calibration, tmp_path, name="out", **settings):
    out = tmp_path / name
    out.mkdir()
    tuned, pruned = models
    cfg = CFG.model_copy(update=settings)
    return recover(pruned, tuned, calibration, cfg, device="cpu", seed=settings.get("seed", 1), out=out)


def test_the_pruned_model_comes_nearer_to_the_tuned_one_and_keeps_every_zero(models, calibration, tmp_path):
    recovered = run(models, calibration, tmp_path)
    before, after = weights(models[1]), weights(recovered)
    model = AutoModelForCausalLM.from_pretrained(recovered.path, dtype=torch.float32)
    matrices = {f"{name}.weight" for name in block_matrices(model)}
    for name, tensor in before.items():
        if name in matrices:
            assert torch.equal(tensor == 0, after[name] == 0), name
        if "wte" in name or "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(tensor, after[name]), name
        else:
            assert not torch.equal(tensor, after[name]), name
    assert recovered.facts["zeros"] == 0.5
    assert recovered.facts["validation_kl"] < 0.9 * recovered.facts["validation_kl_before"]
    assert recovered.facts["steps"] == 8
    assert {path.name for path in recovered.files()} >= {"config.json", "tokenizer.json", "model.safetensors"}


def test_the_same_seed_recovers_the_same_model(models, calibration, tmp_path):
    one, two = (run(models, calibration, tmp_path, name) for name in ("one", "two"))
    assert one.sha256 == two.sha256


def test_features_are_learned_from_too(models, calibration, tmp_path):
    recovered = run(models, calibration, tmp_path, features=1.0)
    assert recovered.facts["loss_history"][0] > 0.1 + run(models, calibration, tmp_path, "x").facts["loss_history"][0]
    assert recovered.facts["validation_kl"] < recovered.facts["validation_kl_before"]


def test_without_steps_the_pruned_model_goes_on_as_it_is(models, calibration, tmp_path):
    recovered = run(models, calibration, tmp_path, steps=0)
    assert recovered.facts["reason"] == "recover.steps is 0" and recovered.facts["zeros"] == 0.5
    assert all(torch.equal(tensor, weights(recovered)[name]) for name, tensor in weights(models[1]).items())


def test_a_model_that_was_not_pruned_needs_no_recovery(models, calibration, tmp_path):
    tuned, _ = models
    recovered = run((tuned, tuned), calibration, tmp_path)
    assert recovered.facts["reason"] == "nothing was pruned"
    assert all(torch.equal(tensor, weights(recovered)[name]) for name, tensor in weights(tuned).items())


def test_a_learning_rate_that_is_too_high_is_an_error_in_words(calibration, tmp_path, monkeypatch):
    broken = half_zero(gpt2())
    broken.transformer.ln_f.weight.data.fill_(float("nan"))
    models = saved(gpt2(), tmp_path / "tuned"), saved(broken, tmp_path / "pruned")
    with pytest.raises(CheckFailed, match=r"recover: the loss is nan at step 1 of 8; lower recover\.learning_rate"):
        run(models, calibration, tmp_path)


def test_a_zero_that_was_lost_is_found_by_its_matrix(models, calibration, tmp_path, monkeypatch):
    def forgets(student, *args):
        weight_of(list(block_matrices(student).values())[3]).fill_(1.0)
        return {"validation_kl": 0.0, "validation_kl_before": 1.0}

    monkeypatch.setattr(stage, "recover_model", forgets)
    with pytest.raises(CheckFailed, match=r"recovery left 0 zeros in \S+\.0\.\S+, pruning made \d+; this is a bug"):
        run(models, calibration, tmp_path)


def test_zeros_that_training_made_by_itself_are_no_error():
    require_zeros({"a": 5}, {"a": 6})
    with pytest.raises(CheckFailed):
        require_zeros({"a": 5}, {"a": 4})


def test_zeros_are_counted_in_the_block_matrices_alone():
    model = gpt2()
    model.transformer.wte.weight.data.zero_()
    assert sum(zero_counts(model).values()) == 0
    half_zero(model)
    assert sum(zero_counts(model).values()) == sum(weight_of(m).numel() for m in block_matrices(model).values()) // 2


def test_a_recovery_that_died_ends_in_the_same_weights(models, calibration, tmp_path):
    tuned, pruned = models
    whole = run(models, calibration, tmp_path)
    given = {"device": "cpu", "seed": 1, "out": tmp_path / "died", "checkpoints": kept(tmp_path / "kept")}
    given["out"].mkdir()
    with pytest.MonkeyPatch.context() as patch:
        die_after(5, patch)
        with pytest.raises(Died):
            recover(pruned, tuned, calibration, CFG, **given)
    again = recover(pruned, tuned, calibration, CFG, **given)
    assert again.facts["resumed"] == 4 and again.sha256 == whole.sha256
