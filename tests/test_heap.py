import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import heap

PROGRAM = """
import ctypes, resource, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from pipeline import heap

PR_SET_THP_DISABLE = 41  # linux/prctl.h: a huge page is one fault, where the system gives them unasked
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1])
with heap.reused() if sys.argv[1] == "reused" else nullcontext():
    for _ in range(20):
        torch.zeros(25_000_000).add_(1)  # 100 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(25_000_000).add_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    kept = resident()
print(faults / (100_000_000 / resource.getpagesize()), (kept - resident()) / (100_000_000 / resource.getpagesize()))
"""


def faults_and_given_back(how: str) -> tuple[float, float]:
    """Of tensors that come and go, in tensors: what the system made anew for 20, and what it got at the end."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", PROGRAM, how]
    found = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    faults, back = map(float, found.stdout.split())
    return faults, back


@pytest.mark.skipif(heap.glibc() is None or not Path("/proc/self/statm").exists(), reason="needs glibc on Linux")
def test_memory_of_freed_tensors_is_used_again_and_given_back_at_the_end():
    faults, back = faults_and_given_back("reused")
    assert faults < 0.1 and back > 0.9
    faults, _ = faults_and_given_back("not")
    assert faults > 10  # what this is for; without, it can go


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "glibc", lambda: None)
    with heap.reused():
        heap.give_back()
