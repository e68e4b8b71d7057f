"""Starts jobs without the ten seconds of imports that each would need: everything is imported once, then forked.

Run as a program, it answers one line of JSON on stdin (an order of tests/spoilt_jobs.py) with one on stdout. It imports
before it starts any thread, so what is forked is as good as new.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import mmap
import os
import re
import signal
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

STATE = struct.Struct("5i")  # count, happened, target, fault, process of the job: as in write_boundaries.c
VARIABLES = ("STATE", "LOG", "ROOTS")
START = "start"
SPOKEN = re.compile(r"[0-9a-f]{16}|/\S+|\d[\d.,]*")  # what differs from start to start
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h: orphans of a job become children of this process
TIMEOUT_SECONDS = 300.0
ORPHANS_SECONDS = 5.0


def serve() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    import_everything()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            become_job(order)
        print(json.dumps(outcome(pid)), file=replies, flush=True)


def import_everything() -> None:
    import torch

    torch.set_num_threads(1)
    import datasets  # noqa: F401
    import google_crc32c  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        GPT2LMHeadModel,
        GPT2Tokenizer,
        GPT2TokenizerFast,
        Trainer,
    )

    import entrypoint  # noqa: F401
    import pipeline.report  # noqa: F401
    from pipeline import bucket, failure, job, stage  # noqa: F401
    from pipeline.sparsity import sparsegpt  # noqa: F401

    stage.code_digest()
    gc.freeze()  # what is here now is not looked through, and so not copied, in every child
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, f"{len(threads)} threads before the first fork"


def become_job(order: dict[str, Any]) -> None:
    os.setsid()
    for name, mode, number in (("/dev/null", os.O_RDONLY, 0), (order["said"], os.O_WRONLY | os.O_CREAT, 1)):
        descriptor = os.open(name, mode, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.dup2(1, 2)
    os.environ.update(order["environment"])
    logging.getLogger("pipeline").addHandler(Sections(order))
    if library := os.environ.get("LD_PRELOAD"):
        ctypes.CDLL(library).watch(*(order["environment"][f"WRITE_BOUNDARIES_{name}"].encode() for name in VARIABLES))
    sys.argv = ["quotesmith", *order["arguments"]]
    import entrypoint

    code: Any = 70
    try:
        entrypoint.main()
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to end the interpreter takes seconds, since what is shared with the server is copied for that


class Sections(logging.Handler):
    """Boundaries are counted from one line of the log to the next: that is their address, the same in every start.

    The line that a stage is done begins no section: a copy of a checkpoint may be under way beside it.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        super().__init__()
        self.order = order
        self.seen: Counter[str] = Counter()
        with Path(order["environment"]["WRITE_BOUNDARIES_STATE"]).open("r+b") as file:
            self.state = mmap.mmap(file.fileno(), 0)
        self.begin(START)

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if threading.current_thread() is threading.main_thread() and ": done in " not in line:
            self.begin(SPOKEN.sub("#", line)[:100])

    def begin(self, line: str) -> None:
        self.seen[line] += 1
        section = f"{line} ({self.seen[line]})"
        _, happened, _, fault, _ = STATE.unpack(self.state)
        here = section == self.order["section"] and not happened
        if here and self.order["leave"] is not None:
            fill_up(Path(self.order["filler"]), self.order["leave"])
        self.state[:] = STATE.pack(0, happened, self.order["number"] if here else 0, fault, os.getpid())
        with Path(self.order["environment"]["WRITE_BOUNDARIES_LOG"]).open("a") as log:
            log.write(f"# {section}\n")


def fill_up(filler: Path, leave: int) -> None:
    """All of a small disk but `leave` bytes."""
    found = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bfree * found.f_frsize - leave))


def outcome(pid: int) -> dict[str, Any]:
    """How the job ended, and which processes it left."""
    begun = time.monotonic()
    code = None
    while code is None and time.monotonic() - begun < TIMEOUT_SECONDS:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.005)
    seconds = time.monotonic() - begun
    if code is None:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"code": code, "seconds": seconds, "left": orphans()}


def orphans() -> list[str]:
    """The command lines of processes that outlive the job; they are ended."""
    end = time.monotonic() + ORPHANS_SECONDS
    while time.monotonic() < end:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.01)
        except ChildProcessError:
            return []
    found = []
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        os.kill(int(child), signal.SIGKILL)
        os.waitpid(int(child), 0)
    return found


if __name__ == "__main__":
    serve()
