"""SIGTERM, SIGHUP and SIGINT: the work saves itself where it is `patient`, then unwinds. Whatever hangs in that, the
process ends with 143, for SIGINT with 130, before the grace period is over, and at a second signal at once; its
children die with it.

Imports nothing that takes time: until `handle` has run, SIGTERM kills without a word, or does nothing to process 1.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipeline import groups, terminal

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KEPT = "a run keeps its finished stages and its checkpoints, and the same command goes on after them"
USABLE = 0.9  # of the grace period; then it ends hard, before the platform does that with another code
SAVING = 0.7  # of the grace period, for what is to be saved; the rest is for unwinding, which gives the lease back
AGAIN_SECONDS = 0.01  # until an exception that was lost is raised once more


class Stopped(BaseException):
    """SIGTERM or SIGHUP, on its way up through the job; SIGINT is a KeyboardInterrupt."""


class State:
    grace_seconds = 10.0
    stops: tuple[signal.Signals, ...] = STOPS
    received: signal.Signals | None = None
    unwinds = False  # there is something to save or to clean up
    waits = False  # what runs must not be torn
    saves = False  # what runs looks at `is_stopping` from time to time
    owed = False  # the signal is an exception, or becomes one where nothing must be torn
    exit_code: int | None = None  # of a command that has ended
    handled = False
    note: Path | None = None  # a file in which the platform looks for why the process ended


state = State()


def handle() -> None:
    """From now on signals are handled as above. For the main thread of a program, not for a library."""
    if state.handled:
        return
    state.handled = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A thread hears of a signal at once, also while the main thread is in a long call and runs no handler.
    threading.Thread(target=watch, args=(reader,), name="signals", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup: then it stays so, also in what is forked
        state.stops = (signal.SIGTERM, signal.SIGINT)
    for number in state.stops:
        signal.signal(number, on_signal)  # SIGINT is ignored where a shell started this with &
    signal.signal(signal.SIGALRM, on_alarm)
    sys.unraisablehook = on_unraisable
    atexit.register(ignore)  # called last, being the first
    os.register_at_fork(before=hold, after_in_parent=let_go, after_in_child=forget)


def ignore() -> None:
    """For the interpreter's own end, where it would put back the handlers that kill, and the code is decided."""
    for number in state.stops:
        signal.signal(number, signal.SIG_IGN)


def forget() -> None:
    """A forked child shares the pipe: its signals must not be taken for the parent's, not even the first moment's."""
    signal.set_wakeup_fd(-1)
    for number in state.stops:
        signal.signal(number, signal.SIG_DFL)
    let_go()


def hold() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def let_go() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


@contextmanager
def unwinding() -> Iterator[None]:
    """Within the block a first signal is an exception in the main thread; elsewhere it ends the process at once."""
    state.unwinds = True
    try:
        yield
    finally:
        state.unwinds = False


@contextmanager
def untorn() -> Iterator[None]:
    """A first signal becomes an exception only at the end of the block, which should be short."""
    if state.waits or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, state.waits = state.owed, True
    try:
        yield
    finally:
        state.waits = False
        if state.owed != before:
            stop()


@contextmanager
def patient() -> Iterator[None]:
    """A first signal becomes an exception at the end of the block, or when the time for saving is over; the work within
    asks `is_stopping` at every point that it can go on from, saves that, and calls `stop`."""
    state.saves = True
    try:
        yield
    finally:
        state.saves = False
        if is_stopping():
            signal.setitimer(signal.ITIMER_REAL, 0)
    if is_stopping():
        stop()


def is_stopping() -> bool:
    return state.received is not None


def heard_of() -> None:
    """Another process of the same work is to stop, and this one with it. For one that handles no signals itself."""
    state.received = state.received or signal.SIGTERM


def on_signal(number: int, frame: FrameType | None) -> None:
    """Where nothing unwinds, and at a second signal, the thread ends the process within milliseconds."""
    if number == signal.SIGHUP:
        terminal.give_up()
    if state.unwinds and not state.received:
        state.received = signal.Signals(number)
        if state.saves:
            signal.setitimer(signal.ITIMER_REAL, SAVING * state.grace_seconds)
        else:
            stop()


def on_alarm(number: int, frame: FrameType | None) -> None:
    """The time for saving is over, or the exception was lost."""
    if is_stopping() and state.unwinds:
        stop()


def on_unraisable(found: sys.UnraisableHookArgs) -> None:
    """What is raised in a destructor or a callback is dropped by Python: a signal's exception is raised again soon."""
    if is_stopping() and issubclass(found.exc_type, Stopped | KeyboardInterrupt):
        state.owed = False
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    else:
        sys.__unraisablehook__(found)


def stop() -> None:
    """The signal becomes an exception: now, or at the end of what must not be torn."""
    state.owed = True
    if not state.waits:
        raise KeyboardInterrupt if state.received == signal.SIGINT else Stopped


def watch(reader: int) -> None:
    number = next_stop(reader, None)
    if number and (state.unwinds or state.received):
        next_stop(reader, USABLE * state.grace_seconds)
    if number:
        end(number)


def next_stop(reader: int, seconds: float | None) -> signal.Signals | None:
    """The next of these signals; None if none comes in time. Others that the program handles are passed over."""
    until = None if seconds is None else time.monotonic() + seconds
    while select.select([reader], [], [], until and max(0.0, until - time.monotonic()))[0]:
        if (byte := os.read(reader, 1)[0]) in STOPS:
            return signal.Signals(byte)
    return None


def end(number: signal.Signals) -> NoReturn:
    """At once, with nothing to save or after the time for it."""
    groups.kill_all()
    if state.exit_code is not None:
        os._exit(state.exit_code)
    said = f"{sentence(state.received or number)}\n".encode()
    with suppress(OSError):
        if state.note:
            file = os.open(state.note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.write(file, said)
    with suppress(OSError):
        if select.select([], [2], [], 0)[1]:  # a log that nobody reads any more would hold the end up
            os.write(2, said)
    os._exit(code_of(state.received or number))


def code_of(number: signal.Signals) -> int:
    """A terminal or connection that is gone asks for the same as SIGTERM."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def sentence(number: signal.Signals) -> str:
    return f"stopped by {number.name}; {KEPT}"


def leave(code: int) -> NoReturn:
    """End the process with `code`, also if a signal comes meanwhile or a library hangs after one."""
    state.exit_code = code
    terminal.flush()
    if state.received:
        os._exit(code)
    sys.exit(code)
