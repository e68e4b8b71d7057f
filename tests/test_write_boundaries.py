"""A whole job, spoilt at every boundary of its writing: killed, stopped, out of disk, refused by the disk.

The boundaries are not listed anywhere: an undisturbed job on the smallest model is watched by a library of ours
(write_boundaries.c) in the job and its tools, so what a new stage writes is tried too. SIGKILL comes before every call
by which something is committed (a stage, a checkpoint, a copy, a release) and before a sample of the others that change
a file; SIGTERM, a full disk and I/O errors come at a sample of all. With EVERY_FAULT=1 in the environment
each fault comes at every boundary, which takes the better part of an hour.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import sealed
from pipeline.llama_cpp import LlamaCpp
from tests.fault_chains import spoil
from tests.fault_record import EVERY_FAULT
from tests.half_done import assert_nothing_is_half_done, left_over, names_in
from tests.spoilt_jobs import (
    CHANGES,
    FULL_TMPFS,
    NEEDS_ROOM,
    Boundary,
    Ended,
    JobServer,
    Place,
    job_server,
)

GROUP = "whole jobs, spoilt where they write"
MOST_MISSED = 0.05  # of the boundaries: those that a thread beside has moved to another section
SAMPLE = 20  # boundaries of each fault, beside those that have to be tried
PROCESSES = min(2, len(os.sched_getaffinity(0)))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if not compiler or not Path("/proc/self/fd").exists():
        pytest.skip("needs Linux and a C compiler")
    path = tmp_path_factory.mktemp("library") / "write_boundaries.so"
    source = Path(__file__).with_name("write_boundaries.c")
    command = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", path, source, "-ldl"]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In memory where there is such a place: thousands of small files, looked through after every fault."""
    path = tmp_path_factory.mktemp("jobs")
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30:
        path = Path(tempfile.mkdtemp(prefix="quotesmith-", dir=memory))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def small(llama_cpp: LlamaCpp, folder: Path) -> tuple[Path, Path]:
    from tests.small_gpt2 import make_model, make_tools

    return make_model(folder / "model"), make_tools(llama_cpp, folder / "tools")


@pytest.fixture(scope="module")
def servers(small: tuple[Path, Path], library: Path) -> Iterator[list[JobServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(job_server(*small, library)) for _ in range(PROCESSES)]


@dataclass
class Undisturbed:
    place: Place
    ended: Ended

    @property
    def stages(self) -> list[str]:
        return re.findall(r"^\S+ (\w+): started$", self.ended.said, re.M)


@pytest.fixture(scope="module")
def undisturbed(servers: list[JobServer], folder: Path) -> Undisturbed:
    place = Place(folder / "undisturbed")
    ended = servers[0].start(place)
    assert ended.code == 0, ended.said
    return Undisturbed(place, ended)


def test_a_job_that_nothing_disturbs_leaves_nothing_but_its_results(undisturbed: Undisturbed) -> None:
    assert_nothing_is_half_done(undisturbed.place, undisturbed.ended)
    assert left_over(undisturbed.place) == []


def test_every_file_that_a_job_leaves_was_seen_being_written(undisturbed: Undisturbed) -> None:
    seen = {boundary.path for boundary in undisturbed.ended.boundaries}
    assert not [name for name in names_in(undisturbed.place) if name not in seen]
    tools = {boundary.call for boundary in undisturbed.ended.boundaries if boundary.path.endswith("-F16.gguf")}
    assert {"create", "write", "close"} <= tools  # by the converter, and in place by the job
    trainings = {boundary.section.partition(": checkpoint")[0] for boundary in undisturbed.ended.boundaries}
    assert {"finetune", "recover", "adapt", "finish"} <= trainings


def test_a_job_writes_the_same_every_time(undisturbed: Undisturbed, servers: list[JobServer], folder: Path) -> None:
    again = servers[-1].start(Place(folder / "again"))
    assert what_it_does(again) == what_it_does(undisturbed.ended)


def what_it_does(ended: Ended) -> Counter[tuple[str, str]]:
    """In whatever order: checkpoints are copied to the bucket beside the training. How often the way to a folder is
    tried to be made depends on which parts of it the other has made."""
    calls = Counter((boundary.call, boundary.path) for boundary in ended.boundaries)
    return Counter({what: 1 if what[0] == "mkdir" else count for what, count in calls.items()})


def test_a_start_is_judged_by_the_call_that_was_spoilt_where_threads_have_changed_their_order(
    undisturbed: Undisturbed, servers: list[JobServer], folder: Path
) -> None:
    """A file that could not be removed is then left to the next start, whichever call was asked for."""
    boundaries = undisturbed.ended.boundaries
    removed = next(each for each in boundaries if each.call == "unlink" and "bucket/out/runs/" in each.path)
    asked = removed._replace(call="sync")
    place = Place(folder / "elsewhere")
    ended = servers[0].start(place, "I/O error", asked)
    assert ended.spoilt and ended.spoilt.section == asked.section and ended.spoilt.number == asked.number
    tried = spoil(servers[0], folder / "judged", "I/O error", [asked], undisturbed.place, undisturbed.stages)
    assert not tried.problems


def commits(boundary: Boundary) -> bool:
    """Whether somebody who reads the bucket or goes on from the work folder would believe what this writes."""
    published = boundary.path.startswith("bucket/out/") and "/checkpoints/" not in boundary.path
    return published or Path(boundary.path).name == sealed.MARKER


def chosen(boundaries: Sequence[Boundary], fault: str) -> list[Boundary]:
    calls = {"SIGKILL": CHANGES, "SIGTERM": CHANGES, "disk full": NEEDS_ROOM}.get(fault)
    can_matter = [boundary for boundary in boundaries if calls is None or boundary.call in calls]
    if EVERY_FAULT:
        return can_matter
    always = {number for number, each in enumerate(can_matter) if fault == "SIGKILL" and commits(each)}
    rest = [number for number in range(len(can_matter)) if number not in always]
    tried = always | set(random.Random(fault).sample(rest, min(SAMPLE, len(rest))))
    return [boundary for number, boundary in enumerate(can_matter) if number in tried]


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGTERM", "disk full", "I/O error"])
def test_after_a_fault_nothing_is_half_done_and_the_next_start_ends_with_the_same_release(
    fault: str,
    undisturbed: Undisturbed,
    servers: list[JobServer],
    folder: Path,
    record_fault: Callable[..., None],
) -> None:
    boundaries = chosen(undisturbed.ended.boundaries, fault)
    size = -(-len(boundaries) // len(servers))
    parts = [boundaries[start : start + size] for start in range(0, len(boundaries), size)]

    with ThreadPoolExecutor() as pool:
        found = pool.map(
            lambda number: spoil(
                servers[number],
                folder / fault.replace("/", "").replace(" ", "-") / str(number),
                fault,
                parts[number],
                undisturbed.place,
                undisturbed.stages,
            ),
            range(len(parts)),
        )
    everything = list(found)
    problems = [problem for tried in everything for problem in tried.problems]
    assert not problems, f"{len(problems)} of {len(boundaries)}:\n\n" + "\n\n".join(problems[:10])
    for tried in everything:
        for outcome, count in tried.outcomes.items():
            record_fault(GROUP, fault, outcome, count)
    missed = sum(len(tried.missed) for tried in everything)
    assert sum(tried.outcomes.total() for tried in everything) == len(boundaries) - missed
    assert missed <= max(3, MOST_MISSED * len(boundaries))


# ---- a disk that is really full


def own_disk(folder: Path, size: str) -> list[str] | None:
    """What puts a small disk at `folder`, for a command alone; None where that is not allowed."""
    command = ["unshare", "--user", "--map-root-user", "--mount"] if os.geteuid() else ["unshare", "--mount"]
    mount = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    full = [*command, "sh", "-c", mount, str(folder)]
    able = shutil.which("unshare") and subprocess.run([*full, "true"], capture_output=True).returncode == 0
    return full if able else None


LEFT_BYTES = (0, 30_000, 1_000_000, 5_000_000)


def test_on_a_small_disk_that_is_full_from_any_stage_on_the_job_ends_with_71_and_goes_on_when_there_is_room(
    small: tuple[Path, Path],
    undisturbed: Undisturbed,
    folder: Path,
    tmp_path: Path,
    record_fault: Callable[..., None],
) -> None:
    mounted = folder / "mounted"
    mounted.mkdir()
    before = own_disk(mounted, "400m")
    if before is None:
        pytest.skip("this system lets nobody mount a tmpfs")
    lines = dict.fromkeys(boundary.section for boundary in undisturbed.ended.boundaries)
    begin = [line for line in lines if ": started" in line or line.startswith(("job:", "publish:"))]
    full = [Boundary(line, left, "full disk", "") for line in begin for left in LEFT_BYTES]
    if not EVERY_FAULT:
        full = full[:: len(LEFT_BYTES) - 1]  # each line with another amount
    with job_server(*small, None, before) as server:
        inside = Path(f"/proc/{server.process.pid}/root{mounted}")
        tried = spoil(server, inside, FULL_TMPFS, full, undisturbed.place, undisturbed.stages, tmp_path)
    assert not tried.problems, "\n\n".join(tried.problems)
    for outcome, count in tried.outcomes.items():
        record_fault(GROUP, FULL_TMPFS, outcome, count)
