from types import SimpleNamespace

import pytest

from pipeline.errors import CheckFailed
from pipeline.trainer import OVERFLOWS_IN_A_ROW, StopAtNonFinite

ARGS = SimpleNamespace(learning_rate=3e-4, max_grad_norm=1.0)
STATE = SimpleNamespace(global_step=7, max_steps=100)


def log(guard, **logs):
    guard.on_log(ARGS, STATE, None, logs=logs)


@pytest.mark.parametrize("name", ["loss", "eval_holdout_loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stops_training_with_what_to_try(name, value):
    with pytest.raises(CheckFailed, match=rf"{name} is {value} at step 7 of 100.*learning_rate \(now 0\.0003\)"):
        log(StopAtNonFinite(fp16=False), **{name: value, "epoch": 1.0})


def test_fp16_may_overflow_while_it_finds_its_scale_but_not_for_ever():
    guard = StopAtNonFinite(fp16=True)
    for _ in range(OVERFLOWS_IN_A_ROW):
        log(guard, loss=1.0, grad_norm=float("inf"))
    log(guard, loss=1.0, grad_norm=2.0)
    for _ in range(OVERFLOWS_IN_A_ROW):
        log(guard, loss=1.0, grad_norm=float("inf"))
    with pytest.raises(CheckFailed, match="grad_norm"):
        log(guard, loss=1.0, grad_norm=float("inf"))


def test_fp16_does_not_excuse_a_loss():
    with pytest.raises(CheckFailed, match="loss is nan"):
        log(StopAtNonFinite(fp16=True), loss=float("nan"))
