"""Memory and cores that this process may have: the machine's, within the container's limits."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path("/")
RUNTIME_BYTES = 500_000_000  # Python, torch and the other libraries, before any model
MEMORY_LIMITS = (Path("sys/fs/cgroup/memory.max"), Path("sys/fs/cgroup/memory/memory.limit_in_bytes"))
UNLIMITED = 1 << 60  # the first version of cgroups has no word for it but a number beyond any machine
CPU_LIMITS = (  # microseconds of CPU time within so many; the first version of cgroups has -1 for no limit
    (Path("sys/fs/cgroup/cpu.max"),),
    (Path("sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("sys/fs/cgroup/cpu/cpu.cfs_period_us")),
)


def memory_available(root: Path = ROOT) -> int | None:
    """Bytes for this process, what it has already included, within the container's limit; None: unknown."""
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found = int(lines["MemAvailable"].split()[0]) * 1024 + own
    except (OSError, KeyError, ValueError):
        return None
    limit = memory_limit(root)
    return found if limit is None else min(found, limit)


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that the container may have; None: no limit."""
    for path in MEMORY_LIMITS:
        try:
            limit = int((root / path).read_text())
            return limit if limit < UNLIMITED else None
        except (OSError, ValueError):  # another version of cgroups, or "max"
            continue
    return None


def usable_cores() -> int:
    """Those that this process may run on, whatever its share of their time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(root: Path = ROOT) -> float:
    """Cores' worth of time that this process may have."""
    usable = usable_cores()
    for paths in CPU_LIMITS:
        try:
            quota, period = (int(word) for path in paths for word in (root / path).read_text().split())
        except (OSError, ValueError):  # another version of cgroups, or "max"
            continue
        return min(usable, quota / period) if quota > 0 else usable
    return usable
