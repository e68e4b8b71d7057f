"""What a training process, a machine or the whole job came to, as it travels to the others: no exit code of a launcher
tells more than that something failed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from pipeline import errors
from pipeline.disk import as_machine_error
from pipeline.errors import CheckFailed, MachineError, NotAllowed, QuotesmithError, TryLater
from pipeline.signals import Stopped

STOPPED = "Stopped"
PEER_LOST = "PeerLost"
KILLED = "Killed"
OUT_OF_MEMORY = "OutOfMemory"
BUG = QuotesmithError.__name__  # which is no permanent failure: nobody knows whether it stays
# What gloo's errors say when another process is gone; they have no class of their own.
CONNECTION = ("gloo", "NCCL", "Connection", "Broken pipe", "process group")
LONGEST = 1000  # characters of a sentence


@dataclass(frozen=True)
class Verdict:
    """`kind` is a class of `pipeline.errors`, or one of the above; empty: the work is done."""

    kind: str = ""
    sentence: str = ""

    @classmethod
    def of_worker(cls, error: BaseException) -> Verdict:
        if isinstance(error, Stopped | KeyboardInterrupt):
            return cls(STOPPED)
        for memory in (error, error.__cause__):  # `device_errors` has a sentence for it, but fewer examples may do
            if isinstance(memory, torch.cuda.OutOfMemoryError):
                return cls(OUT_OF_MEMORY, one_line(memory))
        if isinstance(error, dist.DistError):
            return cls(PEER_LOST, one_line(error))
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in CONNECTION):
            return cls(PEER_LOST, one_line(error))
        return cls.of_error(error)

    @classmethod
    def of_job(cls, error: BaseException | None) -> Verdict:
        """For the machines that wait for machine 0."""
        if error is None:
            return DONE
        if isinstance(error, Stopped | KeyboardInterrupt):
            return cls("TryLater", "the first machine of the job was stopped; the same command goes on")
        return cls.of_error(error)

    @classmethod
    def of_error(cls, error: BaseException) -> Verdict:
        if isinstance(error, PermissionError):
            error = NotAllowed(f"{error.filename} cannot be opened or written: {error.strerror}")
        error = as_machine_error(error, getattr(error, "filename", None) or "by a process") or error
        if isinstance(error, QuotesmithError):
            return cls(type(error).__name__, str(error)[:LONGEST])
        return cls(BUG, f"a bug of quotesmith, whose traceback is in the log: {one_line(error)}")

    @classmethod
    def parsed(cls, text: str | bytes) -> Verdict:
        return cls(**json.loads(text))

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def is_cause(self) -> bool:
        """Of others' verdicts, and not caused by one."""
        return bool(self.kind) and self.kind not in (STOPPED, PEER_LOST, KILLED)

    def require_done(self) -> None:
        if self.kind:
            self.fail()

    def fail(self) -> NoReturn:
        if self.kind == OUT_OF_MEMORY:
            raise torch.cuda.OutOfMemoryError(self.sentence)
        if self.kind == STOPPED:
            raise TryLater("another machine of the job was told to stop; the same command goes on from the checkpoint")
        if self.kind == KILLED:
            raise MachineError(
                f"a training process ended without a word ({self.sentence}), probably killed for lack of memory; run "
                "again with more, training goes on from its last checkpoint"
            )
        if self.kind == PEER_LOST:
            raise TryLater(f"a training process lost the others ({self.sentence}); run again")
        known: type[QuotesmithError] = getattr(errors, self.kind, CheckFailed)
        raise known(self.sentence)


DONE = Verdict()
BLAME = (KILLED, STOPPED, PEER_LOST, DONE.kind)  # after a cause


def blamed(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several, the one that made the others; of equal ones the first."""

    def order(verdict: Verdict) -> int:
        return -1 if verdict.is_cause else BLAME.index(verdict.kind)

    return min(verdicts, key=order, default=DONE)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
