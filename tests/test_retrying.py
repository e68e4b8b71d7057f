from __future__ import annotations

import threading
import time

import pytest

from pipeline import errors, retrying
from pipeline.retrying import PASSING, Deadline, retry
from tests.faulty_requests import simulate_time


class Failing:
    """Fails with each of the errors, then gives 7."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.calls = list(failures), 0

    def __call__(self) -> int:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return 7


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_tried_again(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_time(monkeypatch)
    act = Failing(kind("once"), kind("twice"))
    assert retry(act, Deadline(), "x") == 7
    assert act.calls == 3


@pytest.mark.parametrize("kind", [errors.NotAllowed, errors.InputMissing, errors.ConfigError, OSError, ValueError])
def test_what_does_not_pass_is_raised_at_once(kind: type[Exception]) -> None:
    act = Failing(kind("for good"))
    with pytest.raises(kind, match="for good"):
        retry(act, Deadline(), "x")
    assert act.calls == 1


def test_the_last_error_is_raised_when_the_time_is_over_and_says_how_often_it_was_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulate_time(monkeypatch)
    act = Failing(*(errors.ServiceUnavailable(f"try {number}") for number in range(1, 100)))
    with pytest.raises(errors.ServiceUnavailable) as caught:
        retry(act, Deadline(), "x")
    assert str(caught.value) == f"try {act.calls} (tried {act.calls} times within 60 s)"
    assert 8 < act.calls < 20
    assert retrying.time.monotonic() <= 60


def test_pauses_differ_from_job_to_job(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    for _ in range(8):
        simulate_time(monkeypatch)
        retry(Failing(*[errors.TransferError("x")] * 4), Deadline(), "x")
        waited.append(retrying.time.monotonic())
    assert len(set(waited)) == 8
    assert all(3.75 <= seconds <= 7.5 for seconds in waited)  # half to all of 0.5 + 1 + 2 + 4


def test_data_has_time_for_its_size() -> None:
    assert Deadline().seconds == 60
    assert Deadline(71_000_000).seconds == 60 + 284


def test_a_call_that_hangs_ends_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "BUDGET_SECONDS", 0.2)
    hang = threading.Event()
    started = time.monotonic()
    with pytest.raises(errors.ServiceUnavailable, match=r"gs://b/x is not done within 0\.\d+ s"):
        retry(hang.wait, Deadline(), "gs://b/x")
    assert 0.2 <= time.monotonic() - started < 5
    hang.set()


def test_a_try_that_hangs_is_left_behind_for_a_new_one() -> None:
    hang, tries = threading.Event(), []

    def act() -> int:
        tries.append(1)
        if len(tries) == 1:
            hang.wait()
        return len(tries)

    assert retry(act, Deadline(), "x", one_try=1) == 2
    hang.set()


def test_an_error_keeps_the_place_where_it_was_raised() -> None:
    def faulty() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        retry(faulty, Deadline(), "x")
    assert caught.traceback[-1].name == "faulty"


def test_nothing_is_begun_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "BUDGET_SECONDS", 0.0)
    act = Failing()
    with pytest.raises(errors.ServiceUnavailable):
        retry(act, Deadline(), "x")
    assert act.calls == 0
