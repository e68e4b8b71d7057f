"""Several processes, on one machine or on many, that fine-tune as one. Everything else is the work of machine 0.

`Team` is machine 0's side and `follower.py` the others'. They meet in `meeting.py`, start a process for each GPU with
`launcher.py`, which is torchrun, and each of these processes runs `worker.py`.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from pipeline.artifacts import Facts
from pipeline.config import NodesConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.team.launcher import Place, launch
from pipeline.team.lesson import FACTS, Lesson
from pipeline.team.meeting import Host
from pipeline.team.verdict import Verdict, blamed

log = logging.getLogger(__name__)


@dataclass
class Team:
    """What machine 0 trains with. A context: the other machines learn from its end how the job ended."""

    cfg: NodesConfig
    host: Host | None = None

    identity = None  # who trains does not decide what comes out

    def __enter__(self) -> Team:
        if self.cfg.count > 1:
            self.host = Host(self.cfg)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.host:
            self.host.end(Verdict.of_job(error))

    def dismiss(self) -> None:
        """There is nothing left to train: the other machines end with 0, and cost nothing any more."""
        if self.host:
            self.host.dismiss()

    def processes(self, cfg: TrainConfig, gpus: int) -> int:
        """On each machine."""
        found = processes_of_a_node(cfg, self.cfg, gpus)
        if found < gpus and not self.cfg.processes:
            examples = cfg.batch_size * cfg.accumulation
            log.warning("finetune: %d of %d GPUs are used, which can share a step's %d examples", found, gpus, examples)
        return found

    def train(self, lesson: Lesson, processes: int, require_wanted: Callable[[], None]) -> Facts:
        """What `finetune.train_here` returns, done by all. Raises what it raises in whichever process, what
        `require_wanted` does, and `TryLater` when a machine does not come, is lost or is stopped."""
        text, folder = lesson.as_json(), lesson.out / "team"
        try:
            if host := self.host:
                host.wait_for_all()
                order = host.order(text, processes)
                place = Place(self.cfg.count, 0, processes, self.cfg.master, self.cfg.port + 1, order.name)

                def require_all() -> None:
                    require_wanted()
                    host.require_all_at_work(order.number)

                verdict = launch(text, folder, place, require_all)
                verdict = blamed([verdict, *host.verdicts(order.number, verdict)])
            else:
                verdict = launch(text, folder, Place(1, 0, processes, "127.0.0.1", free_port()), require_wanted)
            verdict.require_done()
            facts: Facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            return facts
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def processes_of_a_node(train: TrainConfig, nodes: NodesConfig, gpus: int) -> int:
    """How many train on each machine, so that all have an equal share of a step's examples. Raises `ConfigError`."""
    examples = train.batch_size * train.accumulation
    asked = nodes.processes or max(1, gpus)
    found = next((count for count in range(asked, 0, -1) if examples % (count * nodes.count) == 0), 0)
    if not found or (nodes.processes and found != asked):
        raise ConfigError(
            f"{nodes.count * asked} processes cannot have equal shares of a step's {examples} examples "
            f"(train.batch_size {train.batch_size} times train.accumulation {train.accumulation}); make one of the "
            "three a multiple or a divisor of the others"
        )
    if gpus and found > gpus:
        raise ConfigError(f"nodes.processes is {found}, but {gpus} GPUs are visible; ask for at most one for each")
    if train.sharding == "full" and found * nodes.count == 1:
        raise ConfigError("train.sharding is full, but only one GPU trains; take several, or set it to none")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
