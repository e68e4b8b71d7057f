"""A total time for a call to a service: it is tried again after growing, jittered pauses, and whatever hangs in it
(a name lookup, a handshake, a server that sends a byte a second), it ends when the time is over."""

from __future__ import annotations

import itertools
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar, cast

from pipeline.errors import ServiceUnavailable, TransferError, TryLater

log = logging.getLogger(__name__)

BUDGET_SECONDS = 60.0  # for all tries of a call that moves no data to speak of
PIECE_BYTES = 32 * 1024 * 1024  # a larger upload goes in pieces, each tried again by itself
SLOWEST_BYTES_PER_SECOND = 250_000  # data adds its size over this: 5 min for GPT-2's file of 71 MB
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 8.0
PASSING = (ServiceUnavailable, TransferError, TryLater)  # what another try can help

Result = TypeVar("Result")


def connect_seconds() -> float:
    return BUDGET_SECONDS / 6


def read_seconds() -> float:
    """Between two packets."""
    return BUDGET_SECONDS / 3


def try_seconds(size_bytes: int = 0) -> float:
    """For one try. What has hung so long is left behind and tried anew: only that connection may be bad."""
    return read_seconds() + size_bytes / SLOWEST_BYTES_PER_SECOND


class Deadline:
    """Runs from its making."""

    def __init__(self, size_bytes: int = 0) -> None:
        self.seconds = BUDGET_SECONDS + size_bytes / SLOWEST_BYTES_PER_SECOND
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())


def retry(act: Callable[[], Result], deadline: Deadline, where: str, one_try: float = math.inf) -> Result:
    """`act`'s result, tried until the deadline while it fails with one of `PASSING`; then its last error.

    Any other error is raised at once. A try that takes longer than `one_try` seconds has failed, though it goes on:
    `act` must not mind an earlier self. `where` names the object in messages.
    """
    pause = FIRST_PAUSE_SECONDS
    for tries in itertools.count(1):
        try:
            return within(act, min(one_try, deadline.left()), where)
        except PASSING as e:
            wait = pause * random.uniform(0.5, 1.0)  # many jobs that failed together must not come back together
            if wait >= deadline.left():
                times = "once" if tries == 1 else f"{tries} times"
                raise type(e)(f"{e} (tried {times} within {deadline.seconds:.3g} s)") from e
            log.debug("%s: try %d failed, the next in %.1f s: %s", where, tries, wait, e)
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    raise AssertionError("unreachable")


def within(act: Callable[[], Result], seconds: float, where: str) -> Result:
    """`act`'s result or error; ServiceUnavailable if neither comes in time.

    `act` runs in a thread of its own, which is then left behind: no timeout of an SDK bounds a name lookup or a slow
    drip. It can still write what it was about to, as a request can whose response is lost.
    """
    outcomes: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcomes.put((act(), None))
        except BaseException as e:
            outcomes.put((None, e))

    try:
        if seconds <= 0:
            raise queue.Empty
        threading.Thread(target=work, name=f"transfer {where}", daemon=True).start()
        result, error = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise ServiceUnavailable(f"{where} is not done within {seconds:.3g} s; check the network") from None
    if error:
        raise error
    return cast(Result, result)
