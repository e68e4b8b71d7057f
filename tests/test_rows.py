import threading

import pytest
import torch

from pipeline.rows import in_parts


@pytest.mark.parametrize(("rows", "at_most"), [(1, 1), (7, 2), (10, 100), (64, 64)])
def test_every_row_is_worked_on_once_in_order_and_never_too_many_at_once(rows, at_most):
    parts = in_parts(lambda indices: indices, rows, at_most, torch.device("cpu"))
    assert torch.equal(torch.cat(parts), torch.arange(rows))
    assert max(map(len, parts)) <= at_most


def test_parts_run_side_by_side_with_one_thread_each_and_torch_keeps_its_own():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = threading.Barrier(2, timeout=20)  # breaks unless two parts wait at it at once

        def work(indices):
            together.wait()
            return torch.get_num_threads()

        assert in_parts(work, 2, 100, torch.device("cpu")) == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_parts_keep_no_gradients_and_pass_their_errors_on():
    weight = torch.ones(4, requires_grad=True)
    assert not any(part.requires_grad for part in in_parts(lambda rows: weight[rows] * 2, 4, 2, weight.device))
    with pytest.raises(ZeroDivisionError):
        in_parts(lambda rows: 1 // 0, 4, 2, weight.device)
