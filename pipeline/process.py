"""Which process something belongs to, so that another one on the same machine can tell that it is gone."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ENDED = ("Z", "X")  # /proc/PID/stat: dead, though its parent has not asked for its exit code yet


def identity() -> dict[str, Any]:
    """Of this process: host and number for people; boot, namespace and start for `is_gone`, where the system has them.

    The number of a process namespace belongs to one at a time, so a process of the same boot and namespace number is
    in this namespace, or its namespace has ended and it with it.
    """
    found: dict[str, Any] = {"host": platform.node(), "pid": os.getpid()}
    with suppress(OSError, ValueError, IndexError):
        found |= {"boot": BOOT_ID.read_text().strip(), "namespace": namespace(), "start": started(os.getpid())}
    return found


def is_gone(process: dict[str, Any]) -> bool:
    """Whether the process of this `identity` has surely ended; False where that cannot be seen from here."""
    mine = identity()
    keys = ("boot", "namespace")
    if not all(key in mine and mine[key] == process.get(key) for key in keys):
        return False
    pid, start = process.get("pid"), process.get("start")
    if not isinstance(pid, int) or not isinstance(start, int):
        return False
    try:
        return started(pid) != start
    except (FileNotFoundError, ProcessLookupError):
        return True
    except (OSError, ValueError, IndexError):
        return False


def signature() -> str:
    """This process in the name of a file that it writes; `is_gone_signature` reads it. "" where it cannot be told."""
    mine = identity()
    if "boot" not in mine:
        return ""
    return f"{mine['boot']}.{mine['namespace'].strip('pid:[]')}.{mine['pid']}.{mine['start']}"


def is_gone_signature(text: str) -> bool:
    """Whether the process of this `signature` has surely ended, on this machine and before our eyes."""
    parts = text.split(".")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts[1:]):
        return False
    boot, space, pid, start = parts
    return is_gone({"boot": boot, "namespace": f"pid:[{space}]", "pid": int(pid), "start": int(start)})


def namespace() -> str:
    return str(Path("/proc/self/ns/pid").readlink())


def started(pid: int) -> int:
    """Clock ticks from boot to its start, -1 if it has ended; a number is used again, but not with the same start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return -1 if fields[0] in ENDED else int(fields[19])
