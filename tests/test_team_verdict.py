import errno

import pytest
import torch

from pipeline import errors
from pipeline.errors import CheckFailed, MachineError, NotAllowed, TryLater
from pipeline.signals import Stopped
from pipeline.team.verdict import DONE, PEER_LOST, STOPPED, Verdict, blamed

CAUSE = Verdict("CheckFailed", "the loss is not finite")


@pytest.mark.parametrize("kind", [errors.QuotesmithError, *errors.QuotesmithError.__subclasses__()])
def test_an_error_travels_with_its_code_and_sentence(kind):
    verdict = Verdict.parsed(Verdict.of_worker(kind("found, needed, to do")).as_json())
    with pytest.raises(kind, match="found, needed, to do") as raised:
        verdict.require_done()
    assert raised.value.exit_code == kind.exit_code


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (Stopped(), TryLater),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), torch.cuda.OutOfMemoryError),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), TryLater),
        (OSError(errno.ENOSPC, "No space left on device"), MachineError),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), NotAllowed),
        (ZeroDivisionError("division by zero"), CheckFailed),
    ],
)
def test_what_else_goes_wrong_has_a_code_too(error, raised):
    with pytest.raises(raised):
        Verdict.of_worker(error).require_done()


def test_work_that_is_done_raises_nothing():
    Verdict.parsed(DONE.as_json()).require_done()


@pytest.mark.parametrize(
    ("verdicts", "one"),
    [
        ([Verdict(PEER_LOST), CAUSE, Verdict(STOPPED)], CAUSE),
        ([DONE, Verdict(PEER_LOST), Verdict(STOPPED)], Verdict(STOPPED)),
        ([DONE, Verdict(PEER_LOST)], Verdict(PEER_LOST)),
        ([DONE, DONE], DONE),
        ([], DONE),
    ],
)
def test_the_cause_is_blamed_not_what_followed_of_it(verdicts, one):
    assert blamed(verdicts) == one


@pytest.mark.parametrize(
    ("error", "kind"),
    [(None, ""), (Stopped(), "TryLater"), (KeyboardInterrupt(), "TryLater"), (MachineError("full"), "MachineError")],
)
def test_the_other_machines_hear_how_the_job_ended(error, kind):
    assert Verdict.of_job(error).kind == kind
