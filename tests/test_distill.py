import copy
import signal
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline import distill as module
from pipeline import signals
from pipeline.checkpoints import Checkpoints
from pipeline.config import ResumeConfig
from pipeline.distill import Group, Recipe, distill, divergence, endless, rate_at, validate
from pipeline.errors import CheckFailed

RECIPE = Recipe(steps=12, batch_tokens=24, learning_rate=5e-3, patience=9, precision="fp32", seed=1)
TEXTS = [[1, *range(n, n + 3 + n % 5), 2] for n in range(3, 25)]
TRAIN, VALIDATION = TEXTS[4:], TEXTS[:4]


def gpt2(seed=0):
    torch.manual_seed(seed)
    return loud(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)))


def llama(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return loud(LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **shape)))


@torch.no_grad()
def loud(model):
    """Weights so large that the predictions differ."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(8)
    return model.eval()


@torch.no_grad()
def damaged(model):
    student = copy.deepcopy(model)
    for parameter in student.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return student


@pytest.fixture(params=[gpt2, llama])
def teacher(request):
    return request.param()


@torch.no_grad()
def slow_kl(student, teacher, texts):
    """KL(teacher || student) of each predicted token, one text and one token at a time; mean, and how many."""
    found = []
    for ids in texts:
        p, q = (model(torch.tensor([ids])).logits[0].double().softmax(-1) for model in (teacher, student))
        for t in range(len(ids) - 1):
            found.append(sum(float(p[t, v] * (p[t, v].log() - q[t, v].log())) for v in range(p.shape[1])))
    return sum(found) / len(found), len(found)


def test_the_loss_is_the_divergence_over_the_whole_vocabulary_whatever_the_padding(teacher):
    student = damaged(teacher)
    texts = [TEXTS[0], TEXTS[7], [5, 6], TEXTS[9]]
    loss, tokens = divergence(student, teacher, texts, RECIPE)
    expected, count = slow_kl(student, teacher, texts)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and tokens == count == sum(len(t) - 1 for t in texts)
    for batch_tokens in (1, 24, 4096):
        recipe = replace(RECIPE, batch_tokens=batch_tokens, features=3.0)
        assert validate(student, teacher, texts, recipe) == pytest.approx(expected, rel=1e-4)


def test_a_student_that_is_the_teacher_has_no_loss_and_nothing_to_learn(teacher):
    student = copy.deepcopy(teacher)
    loss, _ = divergence(student, teacher, TEXTS, replace(RECIPE, features=1.0))
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-4


def test_features_add_the_relative_difference_of_the_blocks_outputs(teacher):
    student = damaged(teacher)
    plain, _ = divergence(student, teacher, TEXTS[:1], RECIPE)
    with_features, _ = divergence(student, teacher, TEXTS[:1], replace(RECIPE, features=0.5))
    ids = torch.tensor(TEXTS[:1])
    ours, theirs = (m.base_model(ids, output_hidden_states=True).hidden_states[1:] for m in (student, teacher))
    shares = [float(((a - b)[:, :-1] ** 2).mean() / (b[:, :-1] ** 2).mean()) for a, b in zip(ours, theirs, strict=True)]
    assert with_features.item() - plain.item() == pytest.approx(0.5 * sum(shares) / len(shares), rel=1e-3)


def test_the_student_comes_nearer_to_the_teacher_and_only_what_was_given_is_trained(teacher):
    student = damaged(teacher)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    trained = {name: p for name, p in student.named_parameters() if "0" in name}
    facts = distill(student, teacher, TRAIN, VALIDATION, [Group(list(trained.values()))], RECIPE, what="test")
    assert facts["validation_kl"] < 0.9 * facts["validation_kl_before"]
    assert facts["validation_kl_before"] == pytest.approx(slow_kl(damaged(teacher), teacher, VALIDATION)[0], rel=1e-4)
    assert facts["validation_kl"] == pytest.approx(slow_kl(student, teacher, VALIDATION)[0], rel=1e-4)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    assert facts["trained_parameters"] == sum(parameter.numel() for parameter in trained.values())
    assert facts["steps"] == facts["planned_steps"] == 12 and len(facts["loss_history"]) == 12
    assert facts["tokens"] > 0 and facts["validation_tokens"] == sum(len(ids) - 1 for ids in VALIDATION)
    points = facts["curve"]
    assert [point["step"] for point in points] == [0, 2, 4, 6, 8, 10, 12]
    assert [point["seconds"] for point in points] == sorted(point["seconds"] for point in points)
    best = min(points, key=lambda point: point["validation_kl"])
    assert (facts["best_step"], facts["validation_kl"]) == (best["step"], best["validation_kl"])


def test_groups_learn_at_their_own_rates():
    teacher = gpt2()
    student = damaged(teacher)
    before = copy.deepcopy(student.state_dict())
    norms = [student.transformer.ln_f.weight], [student.transformer.ln_f.bias]
    recipe = replace(RECIPE, steps=1, learning_rate=1e-3)
    distill(student, teacher, TRAIN, TRAIN, [Group(norms[0]), Group(norms[1], 10)], recipe, what="test")
    moved = [
        float((student.state_dict()[f"transformer.ln_f.{name}"] - before[f"transformer.ln_f.{name}"]).abs().max())
        for name in ("weight", "bias")
    ]
    assert moved[1] == pytest.approx(10 * moved[0], rel=0.01)  # Adam's first step is the learning rate


def run_with_losses(monkeypatch, losses, patience=2, steps=8):
    """Validation losses as given; returns the facts and the parameter after each validation, and at the end."""
    given, seen = iter(losses), []
    teacher = gpt2()
    student = damaged(teacher)
    parameter = student.transformer.ln_f.weight

    def validation(*args):
        seen.append(parameter.detach().clone())
        return next(given)

    monkeypatch.setattr(module, "validate", validation)
    recipe = replace(RECIPE, patience=patience, steps=steps)
    facts = distill(student, teacher, TRAIN, VALIDATION, [Group([parameter])], recipe, what="test")
    return facts, seen, parameter.detach()


def test_the_state_at_the_lowest_validation_loss_is_what_stays(monkeypatch):
    facts, seen, final = run_with_losses(monkeypatch, [9.0, 5.0, 3.0, 4.0, 3.5, 8.0, 8.0, 8.0, 8.0], patience=9)
    assert torch.equal(final, seen[2]) and not torch.equal(final, seen[-1])
    assert (facts["best_step"], facts["validation_kl"], facts["steps"]) == (2, 3.0, 8)


def test_a_student_that_only_gets_worse_is_left_as_it_was(monkeypatch):
    facts, seen, final = run_with_losses(monkeypatch, [1.0, 2.0, 3.0], patience=2)
    assert torch.equal(final, seen[0])
    assert (facts["best_step"], facts["validation_kl"], facts["steps"]) == (0, 1.0, 2)


def test_training_stops_when_the_patience_is_used_up(monkeypatch):
    facts, _, _ = run_with_losses(monkeypatch, [9.0, 5.0, 6.0, 4.0, 6.0, 6.0], patience=2)
    assert (facts["steps"], facts["best_step"]) == (5, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_what_to_change(value):
    teacher = gpt2()
    student = damaged(teacher)
    with torch.no_grad():
        student.transformer.ln_f.bias.fill_(value)
    with pytest.raises(CheckFailed, match=r"recover: the loss is nan at step 1 of 12; lower recover\.learning_rate"):
        distill(student, teacher, TRAIN, VALIDATION, [Group(list(student.parameters()))], RECIPE, what="recover")


def test_the_same_seed_gives_the_same_student_and_another_seed_another():
    teacher = gpt2()

    def trained(seed):
        student = damaged(teacher)
        recipe = replace(RECIPE, seed=seed)
        facts = distill(student, teacher, TRAIN, VALIDATION, [Group(list(student.parameters()))], recipe, what="test")
        return facts["loss_history"], student.transformer.wte.weight.detach()

    torch.manual_seed(10)
    losses, weights = trained(1)
    torch.manual_seed(20)
    again, same = trained(1)
    assert losses == again and torch.equal(weights, same)
    assert trained(2)[0] != losses


def test_a_step_is_followed_by_what_was_asked_for():
    teacher = gpt2()
    student = damaged(teacher)
    weight = student.transformer.h[0].mlp.c_fc.weight
    count = []

    def clear():
        count.append(1)
        weight.data[:, 0] = 0

    distill(student, teacher, TRAIN, TRAIN, [Group([weight])], RECIPE, what="test", after_step=clear)
    assert len(count) == 12 and not weight[:, 0].any()


def test_the_learning_rate_rises_and_falls_to_nothing():
    rates = [rate_at(step, 40) for step in range(41)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and max(rates) == 1
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[40] == pytest.approx(0)
    assert rate_at(22, 40) == pytest.approx(0.5)
    assert [rate_at(0, steps) for steps in (1, 2, 3)] == [1, 1, 1]


def test_batches_hold_every_text_once_a_round_in_an_order_of_their_own():
    batches = endless(TRAIN, 24, seed=5)
    first = [next(batches) for _ in range(len(module.grouped(TRAIN, 24)))]
    second = [next(batches) for _ in range(len(first))]
    assert sorted(text for batch in first for text in batch) == sorted(TRAIN)
    assert sorted(text for batch in second for text in batch) == sorted(TRAIN) and first != second
    assert all(len(batch) * max(map(len, batch)) <= 24 for batch in first)


class Died(BaseException):
    pass


def die_after(step, patch):
    """Right after a step's loss is known, before anything is kept of it."""

    def dies(loss, what, at, recipe):
        if at == step:
            raise Died

    patch.setattr(module, "require_finite", dies)


def stop_in(step, patch):
    """A signal in the middle of a step, to a process that is patient."""
    patch.setattr(signals.state, "received", None)

    def signalled(loss, what, at, recipe):
        if at == step:
            signals.state.received = signal.SIGTERM

    patch.setattr(module, "require_finite", signalled)


def kept(folder, steps=1):
    return Checkpoints(folder, ResumeConfig(steps=steps, minutes=0))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("patience", [1, 9])
def test_a_run_that_died_after_any_step_ends_in_the_same_bits(steps, patience, tmp_path):
    teacher = gpt2()
    recipe = replace(RECIPE, patience=patience, features=0.5, learning_rate=2e-2)

    def trained(checkpoints=None):
        student = damaged(teacher)
        weight = student.transformer.h[0].mlp.c_fc.weight
        groups = [Group(list(student.transformer.h.parameters())), Group([student.transformer.ln_f.weight], 10)]
        given = {"what": "test", "after_step": lambda: weight.data[:, 0].zero_(), "checkpoints": checkpoints}
        return distill(student, teacher, TRAIN, VALIDATION, groups, recipe, **given), student.state_dict()

    facts, weights = trained()
    assert (facts["steps"] < 12) == (patience == 1) and facts["resumed"] == 0
    for died in range(1, facts["steps"] + 1):
        with pytest.MonkeyPatch.context() as patch:
            die_after(died, patch)
            with pytest.raises(Died):
                trained(kept(tmp_path / str(died), steps))
        again, same = trained(kept(tmp_path / str(died), steps))
        assert again["resumed"] == (died - 1) // steps * steps
        assert all(torch.equal(weights[name], same[name]) for name in weights), died
        assert [point["seconds"] for point in again["curve"]] == sorted(point["seconds"] for point in again["curve"])
        for found in (facts, again):
            found["comparable"] = [(point["step"], point["validation_kl"]) for point in found["curve"]]
        timed = ("curve", "resumed")
        assert {k: v for k, v in facts.items() if k not in timed} == {k: v for k, v in again.items() if k not in timed}


@pytest.mark.parametrize("patience", [1, 9])
def test_a_run_that_is_stopped_in_any_step_loses_none_and_ends_in_the_same_bits(patience, tmp_path):
    teacher = gpt2()
    recipe = replace(RECIPE, patience=patience, learning_rate=2e-2)

    def trained(checkpoints=None):
        student = damaged(teacher)
        groups = [Group(list(student.transformer.h.parameters()))]
        given = {"what": "test", "checkpoints": checkpoints}
        return distill(student, teacher, TRAIN, VALIDATION, groups, recipe, **given), student.state_dict()

    facts, weights = trained()
    for step in range(1, facts["steps"]):
        seldom = Checkpoints(tmp_path / str(step), ResumeConfig(minutes=60))
        with pytest.MonkeyPatch.context() as patch:
            stop_in(step, patch)
            with pytest.raises(signals.Stopped):
                trained(seldom)
        again, same = trained(seldom)
        assert again["resumed"] == step and again["loss_history"] == facts["loss_history"]
        assert all(torch.equal(weights[name], same[name]) for name in weights), step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_learns_the_same(precision):
    teacher = gpt2().cuda()
    student = damaged(gpt2()).cuda()
    recipe = replace(RECIPE, precision=precision, features=0.1)
    facts = distill(student, teacher, TRAIN, VALIDATION, [Group(list(student.parameters()))], recipe, what="test")
    assert facts["validation_kl"] < 0.9 * facts["validation_kl_before"]
