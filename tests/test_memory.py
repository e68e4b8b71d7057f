import os

import pytest

from pipeline.memory import cores, memory_available, memory_limit

LIMITS = ["sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"]


@pytest.fixture
def root(tmp_path):
    """A file system in which the kernel says something."""

    def says(**files):
        for name, text in {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return says


@pytest.mark.parametrize("name", LIMITS)
def test_a_container_has_no_more_memory_than_its_limit(name, root):
    whole = memory_available(root())
    assert whole > 8_000_000 * 1024  # and what this process has already
    limited = root(**{name: "123456789\n"})
    assert memory_limit(limited) == memory_available(limited) == 123456789


@pytest.mark.parametrize("text", ["max\n", "9223372036854771712\n"])
def test_no_limit_is_none(text, root):
    assert memory_limit(root(**dict.fromkeys(LIMITS, text))) is None


def test_memory_that_the_kernel_does_not_tell_is_unknown(tmp_path):
    assert memory_available(tmp_path) is None
    assert memory_available() > 0


@pytest.mark.parametrize(
    "half",
    [
        {"sys/fs/cgroup/cpu.max": "50000 100000\n"},
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
    ],
)
def test_a_container_has_no_more_cores_than_its_share_of_time(half, root):
    assert cores(root(**half)) == 0.5


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"sys/fs/cgroup/cpu.max": "max 100000\n"},
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
    ],
)
def test_without_a_limit_all_cores_are_there(told, root):
    assert cores(root(**told)) == len(os.sched_getaffinity(0))
