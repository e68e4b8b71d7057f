import math
from pickle import UnpicklingError

import pytest
import torch

from pipeline.course import OPTIMIZER, WEIGHTS, Best, Course, read, write


def parts(seed=0):
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2, 3).T)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    return Best(parameters, 5.0), optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def step(best, optimizer, schedule):
    sum((parameter**2).sum() for parameter in best.parameters).backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def test_what_was_written_is_put_back_and_the_next_step_is_the_same(tmp_path):
    best, optimizer, schedule = parts()
    step(best, optimizer, schedule)
    best.take(4.0)
    step(best, optimizer, schedule)
    course = Course(1.5, 2, 70, [{"step": 0, "seconds": 0.1, "validation_kl": 1 / 3}], [0.1 + 0.2, 1e-300])
    write(tmp_path, course, best, optimizer, schedule)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["course.json", OPTIMIZER, WEIGHTS]

    other, its_optimizer, its_schedule = parts(seed=1)
    assert read(tmp_path, other, its_optimizer, its_schedule) == course
    assert (other.loss, other.at, other.seen) == (4.0, 1, 1)
    assert its_schedule.get_last_lr() == schedule.get_last_lr()
    for run in ((best, optimizer, schedule), (other, its_optimizer, its_schedule)):
        step(*run)
    for ours, theirs in ((best.parameters, other.parameters), (best.values, other.values)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_optimizer_file_that_runs_code_is_refused(tmp_path):
    best, optimizer, schedule = parts()
    write(tmp_path, Course(), best, optimizer, schedule)
    torch.save({"optimizer": print, "schedule": {}}, tmp_path / OPTIMIZER)
    with pytest.raises(UnpicklingError, match=r"[Ww]eights.only"):
        read(tmp_path, best, optimizer, schedule)


def test_of_losses_that_are_not_numbers_none_is_the_best():
    parameter = torch.nn.Parameter(torch.zeros(1))
    best = Best([parameter], 5.0)
    parameter.data.fill_(1)
    assert best.take(math.nan) == 1
    best.restore()
    assert parameter.item() == 0 and best.loss == 5
