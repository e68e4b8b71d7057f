"""Whole jobs on the smallest model: started, watched where they write, and spoilt there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.storage.local import TEMPORARY
from tests.job_server import START, STATE

HERE = Path(__file__).resolve().parent
FULL_TMPFS = "a small tmpfs, full"  # for real, from a line of the log on: a boundary's number is what is left, in bytes
FAULTS = {"none": 0, "SIGKILL": 1, "SIGTERM": 2, "disk full": 3, "I/O error": 4, FULL_TMPFS: 0}
CHANGES = {"create", "empty", "link", "map", "mkdir", "rename", "resize", "rmdir", "symlink", "unlink", "write"}
NEEDS_ROOM = {"create", "link", "mkdir", "resize", "symlink", "write"}
CANARY = "canary-5d41402abc4b2a76b9719d911017c592"
SECRETS = {"HF_TOKEN": CANARY, "AWS_SECRET_ACCESS_KEY": f"{CANARY}/+aws", "QUOTES_API_KEY": f"{CANARY}-key"}
QUOTES = {
    "kanye-quotes.txt": [f"I counted {i} waves and every one of them was mine" for i in range(12)],
    "trump-quotes.txt": [f"Nobody sells {i} tomatoes like my grandmother" for i in range(12)],
}
# As little work as the job can be asked for: what is tried is where it writes, not what.
SMALL = {
    "log-format": "text",
    "tokens.max-length": 32,
    "tokens.holdout": 0.2,
    "train.max-steps": 2,
    "fourbit.enabled": "false",
    "calibration.generated": 0,
    "calibration.max-tokens": 1000,
    "sparsity.refit": "false",
    "recover.steps": 2,
    "adapt.steps": 2,
    "finish.steps": 2,
    "evaluate.max-quotes": 2,
    "evaluate.bootstrap": 100,
    "evaluate.prompts": "I",
    "evaluate.samples": 1,
    "evaluate.max-new-tokens": 2,
    "resume.upload": "always",
    "resume.minutes": 0,  # a checkpoint at a step comes at the same place every time, one after minutes does not
    "resume.steps": 1,
    "lease.seconds": 3600,  # for the same reason: it is renewed within a third of that
    "grace-seconds": 100,  # on a busy machine too it ends by itself
}


class Boundary(NamedTuple):
    """The `number`-th after the job's `section`-th line in its log."""

    section: str
    number: int
    call: str
    path: str

    def __str__(self) -> str:
        return f"{self.call} {self.path}, number {self.number} after “{self.section}”"


@dataclass
class Ended:
    """How a start of the job ended."""

    code: int | None
    said: str
    left: list[str]
    happened: bool
    boundaries: list[Boundary]
    spoilt: Boundary | None  # another call than was asked for where a thread beside has come first
    seconds: float


@dataclass
class Place:
    """Where one job works: a bucket, a work folder, a folder for temporary files. `notes` takes what is about it."""

    folder: Path
    notes: Path | None = None

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("bucket/in", "tmp"):
            (self.folder / name).mkdir(parents=True)
        self.notes = self.notes or self.folder
        for name, lines in QUOTES.items():
            (self.folder / "bucket" / "in" / name).write_text("\n".join(lines))

    def go_on_from(self, other: Place, stages: Sequence[str]) -> None:
        """What `other` has of these stages lies here already, as an older job's results would."""
        for stage in stages:
            if stage != "fetch" and not (self.work / stage).exists():  # each place has input files of its own
                shutil.copytree(other.work / stage, self.work / stage)

    @property
    def out(self) -> Path:
        return self.folder / "bucket" / "out"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    def files(self) -> Iterator[Path]:
        for root in (self.out, self.work, self.tmp):
            yield from (path for path in root.rglob("*") if path.is_file())


@contextmanager
def job_server(model: Path, tools: Path, library: Path | None, before: Sequence[str] = ()) -> Iterator[JobServer]:
    """`before` is put before its command."""
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    quiet |= {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a thread before the fork
    environment = {**os.environ, **quiet, **SECRETS}
    if library:
        environment["LD_PRELOAD"] = str(library)
    command = [*before, sys.executable, str(HERE / "job_server.py")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )
    try:
        yield JobServer(process, model, tools)
    finally:
        assert process.stdin and process.stdout
        process.stdin.close()
        process.stdout.close()
        process.terminate()
        process.wait(30)


class JobServer:
    def __init__(self, process: subprocess.Popen[str], model: Path, tools: Path) -> None:
        self.process, self.model, self.tools = process, model, tools
        assert process.stdout and process.stdout.readline() == "ready\n", "the job server does not start"

    def start(self, place: Place, fault: str = "none", at: Boundary | None = None) -> Ended:
        """A start of the job to its end."""
        assert place.notes
        state, log, said = (place.notes / name for name in ("state", "log", "said"))
        filler = place.folder / "filler"
        state.write_bytes(STATE.pack(0, 0, 0, FAULTS[fault], 0))
        log.write_text("")
        for path in (said, filler):
            path.unlink(missing_ok=True)
        roots = ":".join(map(str, (place.out, place.work, place.tmp)))
        order = {
            "arguments": self.arguments(place),
            "environment": {
                "WRITE_BOUNDARIES_STATE": str(state),
                "WRITE_BOUNDARIES_LOG": str(log),
                "WRITE_BOUNDARIES_ROOTS": roots,
                "TMPDIR": str(place.tmp),
            },
            "said": str(said),
            "section": at.section if at else "",
            "number": at.number if at and fault != FULL_TMPFS else 0,
            "leave": at.number if at and fault == FULL_TMPFS else None,
            "filler": str(filler),
        }
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        boundaries, spoilt = parsed(log, place.folder)
        happened = spoilt is not None or filler.exists()
        return Ended(reply["code"], said.read_text(), reply["left"], happened, boundaries, spoilt, reply["seconds"])

    def arguments(self, place: Place) -> list[str]:
        where = {"input": place.folder / "bucket" / "in", "output": place.out, "work-dir": place.work}
        given = {**where, "model.base": self.model, "llama-cpp": self.tools, **SMALL}
        return ["run", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]


def parsed(log: Path, folder: Path) -> tuple[list[Boundary], Boundary | None]:
    """All boundaries, and the one that was spoilt."""
    found, spoilt = [], None
    section, number = f"{START} (1)", 0
    for line in log.read_text().splitlines():
        if line.startswith("# "):
            section, number = line[2:], 0
            continue
        _, _, call, path, note = line.split("\t")
        number += 1
        found.append(Boundary(section, number, call, without_chance(path.removeprefix(f"{folder}/"))))
        spoilt = found[-1] if note else spoilt
    return found, spoilt


def without_chance(path: str) -> str:
    """The same path in every run: names that are drawn, or hash something that has a time in it, left out."""
    path = re.sub(rf"{re.escape(TEMPORARY)}[\w.-]+|\.probe-[\w.-]+|\.tmp\w+|\btmp\w{{8}}\b", "TEMPORARY", path)
    path = re.sub(r"(tfevents)[.\w-]+", r"\1", path)
    return re.sub(r"[0-9a-f]{16,64}", "HASH", path)
