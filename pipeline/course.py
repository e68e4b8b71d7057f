"""How far a distillation has come, and as files what it goes on from."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeline.artifacts import Facts
from pipeline.checkpoints import Checkpoints

log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.pt"
COURSE = "course.json"


class Best:
    """The trained parameters at the lowest validation loss so far."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: float) -> None:
        self.parameters, self.loss, self.at, self.seen = parameters, loss, 0, 0
        self.values = [parameter.detach().clone() for parameter in parameters]

    def take(self, loss: float) -> int:
        """How many validations ago the lowest loss was."""
        self.seen += 1
        if loss < self.loss:
            self.loss, self.at = loss, self.seen
            for value, parameter in zip(self.values, self.parameters, strict=True):
                value.copy_(parameter.detach())
        return self.seen - self.at

    def restore(self) -> None:
        copy_into(self.parameters, self.values)


@dataclass
class Course:
    seconds: float = 0.0  # of the starts before this one
    step: int = 0
    tokens: int = 0
    curve: list[Facts] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    ended: bool = False  # by patience perhaps, before the last step


def resumed(
    checkpoints: Checkpoints | None, best: Best, optimizer: Optimizer, schedule: LRScheduler, what: str
) -> Course | None:
    """The course of the newest checkpoint, all that belongs to it put back in place; None where there is none."""
    found = checkpoints.newest() if checkpoints else None
    if not found:
        return None
    course = read(found, best, optimizer, schedule)
    log.info("%s: goes on from its checkpoint at step %d", what, course.step)
    return course


def write(folder: Path, course: Course, best: Best, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Everything that the next step hangs on; the batches follow from their seed and the number of steps."""
    trained = {f"trained.{number}": parameter.detach() for number, parameter in enumerate(best.parameters)}
    lowest = {f"best.{number}": value for number, value in enumerate(best.values)}
    save_file({name: tensor.cpu().contiguous() for name, tensor in (trained | lowest).items()}, folder / WEIGHTS)
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, folder / OPTIMIZER)
    found = {"course": asdict(course), "best": {"loss": best.loss, "at": best.at, "seen": best.seen}}
    (folder / COURSE).write_text(json.dumps(found))


def read(folder: Path, best: Best, optimizer: Optimizer, schedule: LRScheduler) -> Course:
    """The course that `write` wrote, and all that belongs to it put back in place."""
    weights = load_file(folder / WEIGHTS)
    copy_into(best.parameters, [weights[f"trained.{number}"] for number in range(len(best.parameters))])
    best.values = [weights[f"best.{number}"].to(parameter.device) for number, parameter in enumerate(best.parameters)]
    states = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(states["optimizer"])
    schedule.load_state_dict(states["schedule"])
    found = json.loads((folder / COURSE).read_text())
    best.loss, best.at, best.seen = (found["best"][name] for name in ("loss", "at", "seen"))
    return Course(**found["course"])


@torch.no_grad()
def copy_into(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
