"""Whole jobs on the smallest model, each spoilt at one boundary of its writing, and what must be true after that."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import publish, sealed
from pipeline.manifest import object_name
from pipeline.storage.local import TEMPORARY
from tests.job_server import START, STATE

HERE = Path(__file__).resolve().parent
FULL_TMPFS = "a small tmpfs, full"  # for real, from a line of the log on: a boundary's number is what is left, in bytes
FAULTS = {"none": 0, "SIGKILL": 1, "SIGTERM": 2, "disk full": 3, "I/O error": 4, FULL_TMPFS: 0}
CHANGES = {"create", "empty", "link", "map", "mkdir", "rename", "resize", "rmdir", "symlink", "unlink", "write"}
NEEDS_ROOM = {"create", "link", "mkdir", "resize", "symlink", "write"}
CANARY = "canary-5d41402abc4b2a76b9719d911017c592"
SECRETS = {"HF_TOKEN": CANARY, "AWS_SECRET_ACCESS_KEY": f"{CANARY}/+aws", "QUOTES_API_KEY": f"{CANARY}-key"}
QUOTES = {
    "kanye-quotes.txt": [f"I counted {i} waves and every one of them was mine" for i in range(12)],
    "trump-quotes.txt": [f"Nobody sells {i} tomatoes like my grandmother" for i in range(12)],
}
# As little work as the job can be asked for: what is tried is where it writes, not what.
SMALL = {
    "log-format": "text",
    "tokens.max-length": 32,
    "tokens.holdout": 0.2,
    "train.max-steps": 2,
    "fourbit.enabled": "false",
    "calibration.generated": 0,
    "calibration.max-tokens": 1000,
    "sparsity.refit": "false",
    "recover.steps": 2,
    "quantize.encoder": "llama.cpp",
    "finish.steps": 2,
    "evaluate.max-quotes": 2,
    "evaluate.bootstrap": 100,
    "evaluate.prompts": "I",
    "evaluate.samples": 1,
    "evaluate.max-new-tokens": 2,
    "resume.upload": "always",
    "resume.minutes": 0,  # a checkpoint at a step comes at the same place every time, one after minutes does not
    "resume.steps": 1,
    "lease.seconds": 3600,  # for the same reason: it is renewed within a third of that
}


class Boundary(NamedTuple):
    """The `number`-th after the job's `section`-th line in its log."""

    section: str
    number: int
    call: str
    path: str

    def __str__(self) -> str:
        return f"{self.call} {self.path}, number {self.number} after “{self.section}”"


@dataclass
class Ended:
    """How a start of the job ended."""

    code: int | None
    said: str
    left: list[str]
    happened: bool
    boundaries: list[Boundary]
    seconds: float


@dataclass
class Place:
    """Where one job works: a bucket, a work folder, a folder for temporary files. `notes` takes what is about it."""

    folder: Path
    notes: Path | None = None

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("bucket/in", "tmp"):
            (self.folder / name).mkdir(parents=True)
        self.notes = self.notes or self.folder
        for name, lines in QUOTES.items():
            (self.folder / "bucket" / "in" / name).write_text("\n".join(lines))

    def go_on_from(self, other: Place, stages: Sequence[str]) -> None:
        """What `other` has of these stages lies here already, as an older job's results would."""
        for stage in stages:
            if stage != "fetch" and not (self.work / stage).exists():  # each place has input files of its own
                shutil.copytree(other.work / stage, self.work / stage)

    @property
    def out(self) -> Path:
        return self.folder / "bucket" / "out"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    def files(self) -> Iterator[Path]:
        for root in (self.out, self.work, self.tmp):
            yield from (path for path in root.rglob("*") if path.is_file())


@contextmanager
def job_server(model: Path, tools: Path, library: Path | None, before: Sequence[str] = ()) -> Iterator[JobServer]:
    """`before` is put before its command."""
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    quiet |= {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # a thread before the fork
    environment = {**os.environ, **quiet, **SECRETS}
    if library:
        environment["LD_PRELOAD"] = str(library)
    command = [*before, sys.executable, str(HERE / "job_server.py")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )
    try:
        yield JobServer(process, model, tools)
    finally:
        assert process.stdin and process.stdout
        process.stdin.close()
        process.stdout.close()
        process.terminate()
        process.wait(30)


class JobServer:
    def __init__(self, process: subprocess.Popen[str], model: Path, tools: Path) -> None:
        self.process, self.model, self.tools = process, model, tools
        assert process.stdout and process.stdout.readline() == "ready\n", "the job server does not start"

    def start(self, place: Place, fault: str = "none", at: Boundary | None = None) -> Ended:
        """A start of the job to its end."""
        assert place.notes
        state, log, said = (place.notes / name for name in ("state", "log", "said"))
        filler = place.folder / "filler"
        state.write_bytes(STATE.pack(0, 0, 0, FAULTS[fault], 0))
        log.write_text("")
        for path in (said, filler):
            path.unlink(missing_ok=True)
        roots = ":".join(map(str, (place.out, place.work, place.tmp)))
        order = {
            "arguments": self.arguments(place),
            "environment": {
                "WRITE_BOUNDARIES_STATE": str(state),
                "WRITE_BOUNDARIES_LOG": str(log),
                "WRITE_BOUNDARIES_ROOTS": roots,
                "TMPDIR": str(place.tmp),
            },
            "said": str(said),
            "section": at.section if at else "",
            "number": at.number if at and fault != FULL_TMPFS else 0,
            "leave": at.number if at and fault == FULL_TMPFS else None,
            "filler": str(filler),
        }
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        happened = bool(STATE.unpack(state.read_bytes())[1]) or filler.exists()
        return Ended(
            reply["code"], said.read_text(), reply["left"], happened, parsed(log, place.folder), reply["seconds"]
        )

    def arguments(self, place: Place) -> list[str]:
        where = {"input": place.folder / "bucket" / "in", "output": place.out, "work-dir": place.work}
        given = {**where, "model.base": self.model, "llama-cpp": self.tools, **SMALL}
        return ["run", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]


def parsed(log: Path, folder: Path) -> list[Boundary]:
    found = []
    section, number = f"{START} (1)", 0
    for line in log.read_text().splitlines():
        if line.startswith("# "):
            section, number = line[2:], 0
            continue
        _, _, call, path = line.split("\t")
        number += 1
        found.append(Boundary(section, number, call, without_chance(path.removeprefix(f"{folder}/"))))
    return found


def without_chance(path: str) -> str:
    """The same path in every run: names that are drawn, or hash something that has a time in it, left out."""
    path = re.sub(rf"{re.escape(TEMPORARY)}[\w.-]+|\.probe-[\w.-]+|\.tmp\w+|\btmp\w{{8}}\b", "TEMPORARY", path)
    path = re.sub(r"(tfevents)[.\w-]+", r"\1", path)
    return re.sub(r"[0-9a-f]{16,64}", "HASH", path)


OBJECT = without_chance(f"bucket/out/{object_name('0' * 16, '0' * 64)}")


# ---- what must be true


def assert_nothing_is_half_done(place: Place, ended: Ended) -> None:
    """Whatever happened, and whether or not anybody could clean up."""
    assert not ended.left, f"processes are left: {ended.left}"
    assert "Traceback" not in ended.said, ended.said
    assert CANARY not in ended.said
    for path in place.files():
        assert CANARY.encode() not in path.read_bytes(), f"{path} holds a secret"
    for marker in place.folder.rglob(sealed.MARKER):
        if marker.is_symlink():  # what the converter is given
            continue
        if marker.is_relative_to(place.out):
            assert_copy_is_whole(marker)
        elif TEMPORARY not in str(marker):
            assert sealed.opened(marker.parent), f"{marker.parent} is not as its marker says"
    for path in place.out.rglob("sha256/*"):
        assert path.name.startswith(TEMPORARY) or path.name == sha256(path), f"{path} is not what its name says"
    assert_release_is_whole_or_absent(place.out)


def assert_copy_is_whole(marker: Path) -> None:
    for file in sealed.parsed(marker.read_bytes()).files.values():
        assert (marker.parent / "sha256" / file.sha256).stat().st_size == file.size


def assert_release_is_whole_or_absent(out: Path) -> None:
    plain = {path.name for path in out.glob("*") if path.is_file() and not path.name.startswith((TEMPORARY, ".probe"))}
    assert not list(out.rglob("FAILURE.json")), "a fault that passes is recorded as one for good"
    manifests = list(out.rglob("MANIFEST.json"))
    if not manifests:
        assert not plain, f"{plain} before the manifest"
        return
    (manifest,) = manifests
    assert publish.verify(str(manifest))
    listed = {entry["name"]: entry["sha256"] for entry in json.loads(manifest.read_bytes())["objects"]}
    for name in plain - {publish.LATEST}:
        assert sha256(out / name) == listed[name], f"{name} is not the release's"
    if publish.LATEST in plain:
        content = json.loads((out / publish.LATEST).read_bytes())
        assert content["manifest_sha256"] == sha256(manifest)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_over(place: Place) -> list[str]:
    """What only a job at work may have: locks, leases, temporary files."""
    names = re.compile(rf"{re.escape(TEMPORARY)}.*|\.probe-.*|\.tmp.*|tmp\w{{8}}|IN_USE|LEASE\.json")
    found = [path for root in (place.out, place.work) for path in root.rglob("*") if names.fullmatch(path.name)]
    return sorted(str(path.relative_to(place.folder)) for path in (*found, *place.tmp.iterdir()))


def names_in(place: Place) -> Counter[str]:
    """Every file, for comparison with another run's."""
    return Counter(without_chance(str(path.relative_to(place.folder))) for path in place.files())


def digest_in(place: Place) -> str:
    (manifest,) = place.out.rglob("MANIFEST.json")
    return str(json.loads(manifest.read_bytes())["result_digest"])


# ---- many faults


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
            with noted(tried, f"{fault} at {at}"):
                if ended.happened:
                    tried.outcomes[outcome_of(fault, ended)] += 1
                    assert_fault_is_contained(place, fault, at, ended)
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
        if ended.code != 0 or cannot_remove(fault, at):
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


def cannot_remove(fault: str, at: Boundary) -> bool:
    """What the job itself was refused to remove is left to the next start."""
    return fault == "I/O error" and at.call in ("unlink", "rmdir")


def assert_fault_is_contained(place: Place, fault: str, at: Boundary, ended: Ended) -> None:
    assert ended.code in ENDS[fault] | {0}, f"code {ended.code}: {ended.said[-2000:]}"
    assert_nothing_is_half_done(place, ended)
    if fault != "SIGKILL" and not cannot_remove(fault, at):
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
