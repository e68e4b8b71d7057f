"""A training process among several, as torchrun starts it: python -m pipeline.team.worker LESSON.json"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from pipeline import groups, heap, signals
from pipeline.device import device_errors, limit_threads
from pipeline.disk import errors_translated
from pipeline.errors import QuotesmithError
from pipeline.logs import QUIET
from pipeline.meter import peak_of_gpu, peak_of_process
from pipeline.team import together
from pipeline.team.launcher import STOP
from pipeline.team.lesson import FACTS, Lesson
from pipeline.team.verdict import OUT_OF_MEMORY, PEER_LOST, STOPPED, Verdict

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2


def main(path: Path) -> None:
    die_with_torchrun()
    folder, number = path.parent, int(os.environ["RANK"])
    logs_into(folder / f"log-{number}.jsonl", logging.INFO if number == 0 else logging.WARNING)
    threading.Thread(target=watch, args=(folder / STOP,), daemon=True).start()
    verdict = Verdict()
    try:
        learn(Lesson.parsed(path.read_bytes()), folder)
    except BaseException as e:
        verdict = Verdict.of_worker(e)
        if not isinstance(e, QuotesmithError) and verdict.kind not in (STOPPED, PEER_LOST, OUT_OF_MEMORY):
            log.error("%s", "".join(traceback.format_exception(e)))
    write_whole(folder / f"memory-{number}", json.dumps([peak_of_process(), peak_of_gpu()]))
    write_whole(folder / f"verdict-{number}.json", verdict.as_json())
    # Past what waits for other processes at the interpreter's end. Had it failed, torchrun would kill the others,
    # which may be saving the checkpoint that this one has been told to end with.
    logging.shutdown()
    os._exit(0 if verdict.kind in ("", STOPPED) else 1)


def die_with_torchrun() -> None:
    """Which does not see to it, and gives each process a group of its own."""
    groups.die_with_parent()
    with suppress(psutil.Error):
        if "torch.distributed.run" in " ".join(psutil.Process(os.getppid()).cmdline()):
            return
    os._exit(1)  # it died before that


def learn(lesson: Lesson, folder: Path) -> None:
    from pipeline.finetune import train_here

    with errors_translated(folder), device_errors("finetune"), heap.reused():
        limit_threads()
        together.join(lesson.device)
        here = with_files(lesson, folder)
        first = together.rank() == 0
        out = lesson.out if first else folder / f"process-{together.rank()}"
        out.mkdir(parents=True, exist_ok=True)
        checkpoints = here.keeping.checkpoints() if here.keeping and first else None
        found = together.brought(checkpoints.newest() if checkpoints else None, folder / "checkpoint")
        facts = train_here(
            here.base, here.tokens, here.cfg, here.batch_size, here.device, here.seed, out,
            checkpoints or (KeptElsewhere() if here.keeping else None), found,
        )  # fmt: skip
        if first:
            write_whole(folder / FACTS, json.dumps(facts))
        together.part()


def with_files(lesson: Lesson, folder: Path) -> Lesson:
    """The lesson with its files on this machine."""
    first = together.rank() == 0
    base = together.brought(lesson.base.path if first else None, folder / "base")
    tokens = together.brought(lesson.tokens.path if first else None, folder / "tokens")
    assert base and tokens
    return replace(
        lesson,
        base=replace(lesson.base, path=base),
        tokens=replace(lesson.tokens, path=tokens),
    )


class KeptElsewhere:
    """The checkpoints, as every process but the first sees them."""

    wanted = False  # by this process

    def due(self, step: int) -> bool:
        return False

    def save(self, step: int, write: object) -> None:
        if signals.is_stopping():
            signals.stop()


def watch(stop: Path) -> None:
    """A signal goes to the job's own process, which asks with a file."""
    while not stop.exists():
        time.sleep(LOOK_SECONDS)
    together.stop_asked.set()


class Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        content = {"logger": record.name, "level": record.levelno, "message": record.getMessage()}
        return json.dumps(content)


def logs_into(path: Path, level: int) -> None:
    """For the launcher to tell, as it tells its own."""
    handler = logging.FileHandler(path)
    handler.setFormatter(Lines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in (*QUIET, "py.warnings", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
