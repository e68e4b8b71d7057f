"""A machine other than the first: it trains when it is told to, and ends with the exit code of the job."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import nullcontext

import torch

from pipeline import signals
from pipeline.config import JobConfig
from pipeline.disk import errors_translated
from pipeline.errors import ServiceUnavailable
from pipeline.team.launcher import Place, launch
from pipeline.team.meeting import Guest
from pipeline.team.verdict import Verdict
from pipeline.work_folder import alone_in, check_work_dir

log = logging.getLogger(__name__)

KEEPS, DEVICE = "keeping", "device"  # in a lesson


def follow(cfg: JobConfig) -> None:
    """Returns when the training of this job is done. Raises what machine 0 failed with, what this one did, and
    `TryLater` when machine 0 is lost."""
    check_work_dir(cfg.work_dir)
    with alone_in(cfg.work_dir, cfg.lease.wait_seconds):
        folder = cfg.work_dir / "following"
        guest = Guest(cfg.nodes)
        try:
            with errors_translated(cfg.work_dir):
                while order := guest.next_order():
                    learn(cfg, guest, *order)
        except BaseException as e:
            guest.leave(Verdict.of_job(e).sentence or "it was stopped")
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        guest.leave("it is done")
    log.info("nodes: training is done, and with it this machine's part")


def learn(cfg: JobConfig, guest: Guest, lesson: str, processes: int) -> None:
    """One training. What it came to is machine 0's to judge."""
    nodes = cfg.nodes
    place = Place(nodes.count, nodes.rank, processes, nodes.master, nodes.port + 1)
    content = json.loads(lesson)
    saves = content[KEEPS] is not None
    log.info("nodes: trains with %d processes of its own", processes)
    try:
        require_gpus(processes if content[DEVICE] == "cuda" else 0, nodes.rank)
        with signals.patient() if saves else nullcontext():
            verdict = launch(lesson, cfg.work_dir / "following", place, guest.require_not_over)
    except BaseException as e:
        guest.report(Verdict.of_worker(e))
        raise
    guest.report(verdict)


def require_gpus(count: int, rank: int) -> None:
    if count > (visible := torch.cuda.device_count() if count else 0):
        raise ServiceUnavailable(
            f"machine {rank + 1} sees {visible} GPUs, but the first machine trains with {count}; give all machines of "
            "the job equally many (--self-test on it says what is wrong)"
        )
