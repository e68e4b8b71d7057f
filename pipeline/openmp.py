"""How long OpenMP's threads spin before they sleep where they wait for each other, at the end of every operation."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Before torch is imported, or a program started with `environment`. What that says of it already stands.

    By default they spin for long. On a machine with other work, or in a container with less CPU time than cores, each
    then waits for one that is not running: a training step was 11 times slower than with threads that sleep at once,
    and llama.cpp made 1 token a second of GPT-2's size on two busy cores instead of 13. To spin for some microseconds
    costs nothing there; on two idle cores it made a step of SmolLM2-135M a quarter shorter beside `heap.reused`, one of
    GPT-2's shape hardly (scripts/bench_step.py).
    """
    if not WAITING.keys() & environment.keys():
        environment.update(WAITING)
