import subprocess
import sys
from pathlib import Path

from pipeline import heap

FAULTS = """
import resource, sys
from contextlib import nullcontext
import torch
from pipeline import heap

with heap.reused() if sys.argv[1] == "reused" else nullcontext():
    for _ in range(20):
        torch.zeros(25_000_000).add_(1)  # 100 MB
    resident = lambda: int(open("/proc/self/statm").read().split()[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(25_000_000).add_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    kept = resident()
print(kept - resident())
"""
PAGES = 100_000_000 // 4096  # of one tensor


def faults_and_pages_given_back(how: str) -> tuple[int, int]:
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run([sys.executable, "-c", FAULTS, how], cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    faults, back = map(int, found.stdout.split())
    return faults, back


def test_pages_of_freed_tensors_are_used_again_and_given_back_at_the_end():
    faults, back = faults_and_pages_given_back("reused")
    assert faults < PAGES / 10 and back > 0.9 * PAGES
    faults, _ = faults_and_pages_given_back("not")
    assert faults > 10 * PAGES  # what this is for; else it can go


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "glibc", lambda: None)
    with heap.reused():
        heap.give_back()
