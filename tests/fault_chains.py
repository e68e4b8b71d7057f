"""Many faults, one after the other, each followed by a start that goes on after it."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import publish
from tests.half_done import OBJECT, assert_nothing_is_half_done, digest_in, left_over, names_in
from tests.spoilt_jobs import FULL_TMPFS, Boundary, Ended, JobServer, Place


@dataclass
class Tried:
    """What came of many faults."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    completed: int = 0
    missed: list[Boundary] = field(default_factory=list)


LONGEST_CHAIN = 25
WALKED = 8  # of so many chains one ends with a start that does all later stages itself
ENDS = {"SIGKILL": {-9}, "SIGTERM": {143}, "disk full": {71}, "I/O error": {71, 74, 75}, FULL_TMPFS: {71}}


def spoil(
    server: JobServer,
    folder: Path,
    fault: str,
    boundaries: Sequence[Boundary],
    reference: Place,
    stages: Sequence[str],
    notes: Path | None = None,
) -> Tried:
    """Starts the job again and again in the same place, each start spoilt at a later boundary than the one before. So
    every fault is followed by a start that goes on after it. The last start of such a chain is not spoilt; it must end
    with the same release as in `reference`, and no file more or less.

    A section of the log that a start does not come to again, having gone on behind it, is spoilt once in each chain
    from then on. A boundary that is the first of a chain and not there is `missed`: checkpoints are copied by a thread
    beside the training, so that what it writes can fall into one section or the next. Before the first start, and
    before the last of most chains, the work of other stages than that of the fault is taken from `reference`; it only
    counts if the hashes of what it was made from are those of here. `stages` are the names of all of them, in their
    order; `notes` is where the places keep theirs.
    """
    tried, once = Tried(), set()
    waiting = dict(enumerate(boundaries))
    for chain in itertools.count():
        if not waiting:
            return tried
        number, at = next(iter(waiting.items()))
        place = Place(folder / str(chain), notes)
        place.go_on_from(reference, stages[: stage_of(at, stages)])
        for link in range(LONGEST_CHAIN):
            ended = server.start(place, fault, at)
            with noted(tried, f"{fault} at {ended.spoilt or at}"):
                if ended.happened:
                    tried.outcomes[outcome_of(fault, ended)] += 1
                    assert_fault_is_contained(place, fault, ended)
                elif link:
                    once.add(at.section)
                else:
                    tried.missed.append(at)
            if ended.happened or not link:
                del waiting[number]
            left_alone = {at.section} & once
            later = ((n, each) for n, each in waiting.items() if n > number and each.section not in left_alone)
            number, following = next(later, (number, None))
            if ended.code == 0 or following is None or link == LONGEST_CHAIN - 1:
                break
            at = following
        if ended.code != 0 or cannot_remove(fault, ended):
            if chain % WALKED:
                place.go_on_from(reference, stages[stage_of(at, stages) + 1 :])
            ended = server.start(place)
        with noted(tried, f"the start after {fault} up to {at}"):
            assert_is_like(reference, place, ended)
            tried.completed += 1
        shutil.rmtree(place.folder)
    raise AssertionError("unreachable")


def stage_of(boundary: Boundary, stages: Sequence[str]) -> int:
    """The stage that the boundary belongs to: what comes before and after all of them counts as the first and last."""
    name = boundary.section.partition(":")[0]
    return stages.index(name) if name in stages else len(stages) - 1 if name == "publish" else 0


@contextmanager
def noted(tried: Tried, where: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as e:
        tried.problems.append(f"{where}: {e}")


def outcome_of(fault: str, ended: Ended) -> str:
    if ended.code == 0:
        return "went on without what failed, and published"
    return "killed" if fault == "SIGKILL" else f"ended with code {ended.code}"


def cannot_remove(fault: str, ended: Ended) -> bool:
    """What the job itself was refused to remove is left to the next start."""
    return fault == "I/O error" and ended.spoilt is not None and ended.spoilt.call in ("unlink", "rmdir")


def assert_fault_is_contained(place: Place, fault: str, ended: Ended) -> None:
    assert ended.code in ENDS[fault] | {0}, f"code {ended.code}: {ended.said[-2000:]}"
    assert_nothing_is_half_done(place, ended)
    if fault != "SIGKILL" and not cannot_remove(fault, ended):
        # A checkpoint is copied to the bucket by a thread beside; the next start clears up when the job ended under it.
        left = [name for name in left_over(place) if "/training/" not in name]
        assert not left, f"code {ended.code} and left {left}"


def assert_is_like(reference: Place, place: Place, ended: Ended) -> None:
    assert ended.code == 0, f"code {ended.code}: {ended.said[-2000:]}"
    assert_nothing_is_half_done(place, ended)
    assert digest_in(place) == digest_in(reference)
    assert publish.verify(str(place.out))
    assert not (left := left_over(place)), f"left are {left}"
    # metrics.json tells of times, so that of a publication that was broken off is another object; no manifest lists it.
    more, less = names_in(place) - names_in(reference), names_in(reference) - names_in(place)
    assert not less and set(more) <= {OBJECT}, f"more: {more}, less: {less}"
