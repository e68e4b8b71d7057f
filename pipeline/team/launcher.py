"""One machine's training processes, started by torchrun and watched: its exit code says only that one of them failed,
so each leaves its verdict in a file, and its log lines, which are told here."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline import child, signals
from pipeline.meter import saw_tool
from pipeline.team.verdict import KILLED, PEER_LOST, Verdict, blamed

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.1
ENDING_SECONDS = 3.0  # between the verdicts of all and torchrun's own end
GONE_SECONDS = 10.0  # after SIGKILL
DEATH = re.compile(r"exitcode\s*:\s*-(\d+)")  # in torchrun's report: the number of a signal
LESSON = "lesson.json"
STOP = "stop"  # a file that asks the processes to save a checkpoint and end
WORKER = "pipeline.team.worker"
SOURCE = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Place:
    """One machine among those that train; `port` is machine 0's, for torch.distributed alone."""

    machines: int
    rank: int
    processes: int
    master: str
    port: int
    name: str = "alone"  # of the attempt: a process that another left behind does not join it

    def command(self, lesson: Path) -> list[str]:
        options = {
            "nnodes": self.machines,
            "node-rank": self.rank,
            "nproc-per-node": self.processes,
            "master-addr": self.master,
            "master-port": self.port,
            "rdzv-id": self.name,
            "max-restarts": 0,  # a restart is the platform's: by then a machine may be lost
        }
        given = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "torch.distributed.run", *given, "--module", WORKER, str(lesson)]


def launch(lesson: str, folder: Path, place: Place, check: Callable[[], None]) -> Verdict:
    """What the processes of this machine came to, once all have ended. `check` is called all the time meanwhile, and
    what it raises ends them; so does a signal, after they have saved a checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / LESSON
    path.write_text(lesson, encoding="utf-8")
    told = Told(folder)
    with (
        child.started(place.command(path), stdout=subprocess.DEVNULL, env=environment(place)) as (process, said),
        no_orphans(process.pid),
    ):
        ends_at = math.inf
        while process.poll() is None and time.monotonic() < ends_at:
            told.tell()
            if len(verdicts_in(folder)) == place.processes:  # torchrun may still wait for another machine's
                ends_at = min(ends_at, time.monotonic() + ENDING_SECONDS)
            if signals.is_stopping():
                (folder / STOP).touch()
            check()
            time.sleep(WATCH_SECONDS)
        told.tell()
        verdict = verdict_of(verdicts_in(folder), place.processes, child.text_of(said))
    if verdict.kind and signals.is_stopping():
        signals.stop()
    return verdict


@contextmanager
def no_orphans(launcher: int) -> Iterator[None]:
    """torchrun's processes are in groups of their own, so they do not go with its group."""
    try:
        yield
    finally:
        found = []
        with suppress(psutil.Error):
            found = psutil.Process(launcher).children(recursive=True)
        for each in found:
            with suppress(psutil.Error):
                each.kill()
        psutil.wait_procs(found, timeout=GONE_SECONDS)


def verdicts_in(folder: Path) -> list[Verdict]:
    return [Verdict.parsed(path.read_bytes()) for path in sorted(folder.glob("verdict-*.json"))]


def verdict_of(found: list[Verdict], processes: int, said: str) -> Verdict:
    """Where some left none: torchrun says of each how it ended. At the first that fails it ends the others itself."""
    verdict = blamed(found)
    if verdict.is_cause or len(found) == processes:
        return verdict
    deaths = [number for number in map(int, DEATH.findall(said)) if number != signal.SIGTERM]
    if deaths:
        return Verdict(KILLED, f"signal {deaths[0]}")
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    return verdict if verdict.kind else Verdict(PEER_LOST, f"torchrun: {last.strip()[:200]}")


def environment(place: Place) -> dict[str, str]:
    """Beside this process's own: where the program lies, and the network through which the machines reach each other.

    gloo would ask for its own host's name, which need not be known, or not by the right address.
    """
    found = {"PYTHONSAFEPATH": "1"}  # nothing is imported from where the user happens to be
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_towards(place.master, place.port)):
        found["GLOO_SOCKET_IFNAME"] = name
    return found


def interface_towards(host: str, port: int) -> str | None:
    """The network interface that packets to `host` leave by, or that has its address; None if nobody knows."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(own == each.address for each in addresses)), None)


@dataclass
class Told:
    """Log lines of the processes, told on as they come."""

    folder: Path
    read: dict[Path, int] = field(default_factory=dict)  # bytes

    def tell(self) -> None:
        for path in sorted(self.folder.glob("log-*.jsonl")):
            with path.open("rb") as file:
                file.seek(self.read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.read[path] = self.read.get(path, 0) + len(line)
                    content = json.loads(line)
                    logging.getLogger(content["logger"]).log(content["level"], "%s", content["message"])
        for path in set(self.folder.glob("memory-*")) - set(self.read):
            self.read[path] = path.stat().st_size
            saw_tool(*json.loads(path.read_text()))
