"""A machine other than the first: it trains when it is told to, and ends with the exit code of the job."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch

from pipeline import signals
from pipeline.config import JobConfig
from pipeline.disk import errors_translated
from pipeline.errors import ServiceUnavailable
from pipeline.team.launcher import Place, launch
from pipeline.team.meeting import Guest, Order, Superseded
from pipeline.team.verdict import PEER_LOST, Verdict
from pipeline.work_folder import alone_in, check_work_dir

log = logging.getLogger(__name__)

KEEPS, DEVICE = "keeping", "device"  # in a lesson


def follow(cfg: JobConfig) -> None:
    """Returns when the training of this job is done. Raises what machine 0 failed with, what this one did, and
    `TryLater` when machine 0 is lost."""
    check_work_dir(cfg.work_dir)
    folder = cfg.work_dir / f"machine-{cfg.nodes.rank + 1}"  # all may share one drive
    with alone_in(folder, cfg.lease.wait_seconds):
        guest = Guest(cfg.nodes)
        try:
            with errors_translated(folder):
                while order := guest.next_order():
                    guest.report(learn(cfg, guest, order, folder / "training"))
        except BaseException as e:
            stopped = isinstance(e, signals.Stopped | KeyboardInterrupt)
            guest.leave("it was stopped" if stopped else Verdict.of_job(e).sentence)
            raise
        finally:
            shutil.rmtree(folder / "training", ignore_errors=True)
        guest.leave("it is done")
    log.info("nodes: training is done, and with it this machine's part")


def learn(cfg: JobConfig, guest: Guest, order: Order, folder: Path) -> Verdict:
    """What one training came to is machine 0's to judge."""
    nodes = cfg.nodes
    place = Place(nodes.count, nodes.rank, order.processes, nodes.master, nodes.port + 1, order.name)
    lesson = json.loads(order.lesson)
    log.info("nodes: trains with %d processes of its own", order.processes)
    try:
        require_gpus(order.processes if lesson[DEVICE] == "cuda" else 0, nodes.rank)
        with signals.patient() if lesson[KEEPS] else nullcontext():
            return launch(order.lesson, folder, place, guest.require_not_over)
    except Superseded:
        return Verdict(PEER_LOST, "another attempt has begun")
    except BaseException as e:
        guest.report(Verdict.of_worker(e))
        raise


def require_gpus(count: int, rank: int) -> None:
    if count > (visible := torch.cuda.device_count() if count else 0):
        raise ServiceUnavailable(
            f"machine {rank + 1} sees {visible} GPUs, but the first machine trains with {count}; give all machines of "
            "the job equally many (--self-test on it says what is wrong)"
        )
