"""Where the machines of a job meet: a key-value store of torch's (TCPStore) on machine 0. Through it they learn what to
train and how it ended, and each shows the others that it lives.

torch.distributed by itself notices a machine that was switched off when its time limit is over (`together.PATIENCE`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch.distributed has no __all__

from pipeline import signals
from pipeline.config import NodesConfig
from pipeline.errors import ConfigError, TryLater
from pipeline.stage import code_digest
from pipeline.team.line import MACHINE, Line
from pipeline.team.verdict import DONE, STOPPED, Verdict

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0  # of one try; between two of them a signal is looked at
PATIENCE_SECONDS = 0.2
LAST_WORD_SECONDS = 3.0  # in which the others hear of the end, and leave
CAUSE_SECONDS = 10.0  # in which others say what they ended of, when this one's processes lost theirs
# After another machine's processes have ended, ours may take this long: they save a model, or copy a checkpoint.
ENDING_SECONDS = 600.0
ORDER = "order/{}"
VERDICT = "verdict/{}/{}"
LEFT = "left/{}"  # by the id of the process: another may come in its place
END = "end"


@dataclass(frozen=True)
class Order:
    """To train; `name` is the attempt's."""

    number: int
    lesson: str
    processes: int
    name: str


class Superseded(Exception):
    """Another attempt has begun."""


class Host:
    """Machine 0's side."""

    def __init__(self, cfg: NodesConfig) -> None:
        self.cfg = cfg
        self.others = range(1, cfg.count)
        self.number = 0  # of the last order
        self.known: dict[int, str] = {}  # ids of the machines' processes, when all were there
        self.line = Line(listen(cfg), 0, self._wanted)
        self.line.start()
        log.info("nodes: machine 1 of %d, the others meet it at %s:%d", cfg.count, cfg.master, cfg.port)

    def wait_for_all(self) -> None:
        """Raises `TryLater` when they do not all come in time, or one leaves; `ConfigError` for other versions."""
        end = time.monotonic() + self.cfg.wait_seconds
        while missing := [rank for rank in self.others if not self._is_there(rank)]:
            self._require_no_end()
            if time.monotonic() > end:
                raise TryLater(
                    f"{self.cfg.count - len(missing)} of {self.cfg.count} machines came within "
                    f"{self.cfg.wait_seconds:g} s (nodes.wait_seconds); see why {named(missing)} did not, and run again"
                )
            patiently()
        for rank in self.others:
            self.known[rank] = self._id(rank) or ""
            if json.loads(self.line.heard[MACHINE.format(rank)])["code"] != code_digest():
                raise ConfigError(f"{named([rank])} has another version of quotesmith; give all the same image")

    def order(self, lesson: str, processes: int) -> Order:
        self.number += 1
        order = Order(self.number, lesson, processes, f"{self.line.id}-{self.number}")
        self.line.say(ORDER.format(self.number), json.dumps(asdict(order)))
        return order

    def require_all_at_work(self, number: int) -> None:
        """Raises `TryLater` for a machine that is lost or gave up, soon after that."""
        self._require_no_end()
        for rank in self.others:
            # Looked at before its verdict, which a machine that left gave first.
            left = self.line.heard.get(LEFT.format(self._id(rank)))
            key = VERDICT.format(number, rank)
            if key in self.line.heard:
                failed = Verdict.parsed(self.line.heard[key]).kind not in (DONE.kind, STOPPED)
                if self.line.silence(key) > (CAUSE_SECONDS if failed else ENDING_SECONDS):
                    raise TryLater(f"{named([rank])} has ended its training, but this machine's goes on; run again")
            elif self.line.silence(MACHINE.format(rank)) > self.cfg.lost_seconds:
                raise TryLater(
                    f"{named([rank])} said nothing for {self.cfg.lost_seconds:g} s (nodes.lost_seconds), so it is "
                    "lost; run again, training goes on from its last checkpoint"
                )
            elif self._id(rank) != self.known[rank]:
                raise TryLater(f"{named([rank])} was started anew in the middle of training; run again")
            elif left:
                raise TryLater(f"{named([rank])} left: {left.decode()}; run again")

    def verdicts(self, number: int, own: Verdict) -> list[Verdict]:
        """The others', where somebody must know why this machine's processes failed. Where they are done, all are."""
        if own.is_cause or not own.kind:
            return []
        end = time.monotonic() + self.cfg.lost_seconds + CAUSE_SECONDS
        keys = [VERDICT.format(number, rank) for rank in self.others]
        while time.monotonic() < end and not all(key in self.line.heard for key in keys):
            self.require_all_at_work(number)
            patiently()
        return [Verdict.parsed(self.line.heard[key]) for key in keys if key in self.line.heard]

    def dismiss(self) -> None:
        """There is nothing left to train: the others end well, also those that come later."""
        self.line.say(END, DONE.as_json())

    def end(self, verdict: Verdict) -> None:
        """The others hear of it and leave, those that are there. Where the job is done, those that have yet to come are
        waited for: nobody else would tell them, and their platform would start them again and again."""
        self.line.say(END, verdict.as_json())
        missing = [] if verdict.kind else [rank for rank in self.others if self._id(rank) is None]
        if missing:
            log.info("nodes: waits for %s, to say that there is nothing to train", named(missing))
        self._while(lambda: any(self._id(rank) is None for rank in missing), self.cfg.wait_seconds)
        self._while(lambda: any(self._is_there(rank) for rank in self.others), LAST_WORD_SECONDS)
        self.line.close()

    def _while(self, waits: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        stopping = signals.is_stopping()  # then these are the last words; a signal that comes now ends the waiting
        while waits() and time.monotonic() < end and not self.line.broken and signals.is_stopping() == stopping:
            time.sleep(PATIENCE_SECONDS / 2)

    def _is_there(self, rank: int) -> bool:
        there = self._id(rank) is not None and self.line.silence(MACHINE.format(rank)) < self.cfg.lost_seconds
        return there and LEFT.format(self._id(rank)) not in self.line.heard

    def _require_no_end(self) -> None:
        if self.line.broken:
            raise TryLater(f"the meeting place of the machines failed ({self.line.broken}); run again")

    def _id(self, rank: int) -> str | None:
        value = self.line.heard.get(MACHINE.format(rank))
        return None if value is None else str(json.loads(value)["id"])

    def _wanted(self) -> Iterable[str]:
        for rank in self.others:
            yield from (MACHINE.format(rank), LEFT.format(self._id(rank)))  # the verdict after this, as above
            if self.number:
                yield VERDICT.format(self.number, rank)


class Guest:
    """The side of every other machine."""

    def __init__(self, cfg: NodesConfig) -> None:
        self.cfg = cfg
        self.number = 1  # of the order that is waited for
        log.info("nodes: machine %d of %d, meets the first at %s:%d", cfg.rank + 1, cfg.count, cfg.master, cfg.port)
        self.line = Line(connect(cfg), cfg.rank, self._wanted)
        self.line.start()

    def next_order(self) -> Order | None:
        """None when the job has nothing more for this machine. Raises what the job failed with, and `TryLater` when
        machine 0 is lost."""
        while END not in self.line.heard:
            if order := self.line.heard.get(ORDER.format(self.number)):
                return Order(**json.loads(order))
            self.require_host()
            patiently()
        Verdict.parsed(self.line.heard[END]).require_done()
        return None

    def report(self, verdict: Verdict) -> None:
        self.line.say(VERDICT.format(self.number, self.cfg.rank), verdict.as_json())
        self.number += 1

    def require_host(self) -> None:
        silent = time.monotonic() - self.line.last_at
        if not self.line.broken and MACHINE.format(0) in self.line.heard:
            silent = max(silent, self.line.silence(MACHINE.format(0)))
        if self.line.broken or silent > self.cfg.lost_seconds:
            why = self.line.broken or f"nothing was heard of it for {silent:.0f} s"
            raise TryLater(f"the first machine of the job is lost ({why}); run again")

    def require_not_over(self) -> None:
        """In training: machine 0 lives, and has not given up. Raises `Superseded` if it tries anew."""
        self.require_host()
        if ORDER.format(self.number + 1) in self.line.heard:
            raise Superseded
        if end := self.line.heard.get(END):
            Verdict.parsed(end).require_done()

    def leave(self, why: str) -> None:
        self.line.say(LEFT.format(self.line.id), why)
        self.line.was_said(LAST_WORD_SECONDS)
        self.line.close()

    def _wanted(self) -> Iterable[str]:
        return END, MACHINE.format(0), ORDER.format(self.number), ORDER.format(self.number + 1)


def listen(cfg: NodesConfig) -> TCPStore:
    try:
        return TCPStore("localhost", cfg.port, is_master=True, wait_for_workers=False)
    except RuntimeError as e:
        raise TryLater(
            f"port {cfg.port} of this machine cannot be listened at ({first_words(e)}); end what uses it, or set "
            "nodes.port on all machines"
        ) from e


def connect(cfg: NodesConfig) -> TCPStore:
    end = time.monotonic() + cfg.wait_seconds
    while True:
        try:
            return TCPStore(cfg.master, cfg.port, is_master=False, timeout=timedelta(seconds=CONNECT_SECONDS))
        except RuntimeError as e:
            if time.monotonic() > end:
                raise TryLater(
                    f"the first machine of the job did not answer at {cfg.master}:{cfg.port} within "
                    f"{cfg.wait_seconds:g} s (nodes.wait_seconds): {first_words(e)}; see whether it runs, and run again"
                ) from e
        patiently()


def patiently() -> None:
    """One turn of waiting. A first signal may only want to be looked at, where work is saved before it ends."""
    if signals.is_stopping():
        signals.stop()
    time.sleep(PATIENCE_SECONDS)


def named(ranks: Iterable[int]) -> str:
    """Machines as people count them."""
    return "machine " + ", ".join(str(rank + 1) for rank in ranks)


def first_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
