import errno

import pytest
import torch
import torch.distributed as dist

from pipeline import errors
from pipeline.device import device_errors
from pipeline.errors import ConfigError, MachineError, NotAllowed, QuotesmithError, TryLater
from pipeline.signals import Stopped
from pipeline.team.verdict import DONE, KILLED, OUT_OF_MEMORY, PEER_LOST, STOPPED, Verdict, blamed

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
        (dist.DistNetworkError("The client socket has timed out after 5000ms"), TryLater),
        (dist.DistStoreError("wait timeout after 1000ms, keys: /x"), TryLater),
    ],
)
def test_what_else_goes_wrong_has_a_code_too(error, raised):
    with pytest.raises(raised):
        Verdict.of_worker(error).require_done()


def test_a_bug_is_not_a_failure_for_good():
    with pytest.raises(QuotesmithError, match="a bug of quotesmith") as raised:
        Verdict.of_worker(ZeroDivisionError("division by zero")).require_done()
    assert type(raised.value) is QuotesmithError and raised.value.exit_code == 70


def test_memory_that_ran_out_within_a_stage_is_told_so_that_fewer_examples_are_tried():
    with pytest.raises(ConfigError) as translated, device_errors("finetune"):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    assert Verdict.of_worker(translated.value).kind == OUT_OF_MEMORY


def test_a_killed_process_is_the_machines_fault_unless_another_knows_more():
    with pytest.raises(MachineError, match=r"without a word \(signal 9\)"):
        blamed([Verdict(PEER_LOST), Verdict(KILLED, "signal 9")]).require_done()
    assert blamed([Verdict(KILLED, "signal 6"), CAUSE]) == CAUSE


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
