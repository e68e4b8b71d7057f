"""Runs stages, times them, and skips what is done.

A stage's folder is named by its fingerprint: a hash of the code, its settings and the hashes of its inputs.
It is sealed when the stage is done, so a folder that is torn, or has other files, is done again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, TypeAdapter

from pipeline import heap, signals
from pipeline.artifacts import Facts
from pipeline.checkpoints import Checkpoints
from pipeline.config import ResumeConfig
from pipeline.device import device_errors
from pipeline.disk import clear, errors_translated
from pipeline.meter import Meter
from pipeline.mirror import Mirror, Owner, tolerated
from pipeline.sealed import opened, seal
from pipeline.storage import scheme_of
from pipeline.work_cache import make_room, touch

log = logging.getLogger(__name__)

Artifact = TypeVar("Artifact")

# Worth a copy in the bucket: what took a GPU, or minutes. For GPT-2 on 2 CPU cores: finetune 87 s for 498 MB, sparsify
# and recover 498 MB each, quantize, adapt and finish 71 MB each, calibrate and evaluate a few kB. Not worth it: obtain
# (498 MB that come from a hub or bucket anyway), export (17 s for 250 MB), tokenize (0.1 s); and without fetch there is
# no run_id.
COPIED = ("finetune", "calibrate", "sparsify", "recover", "extend", "quantize", "adapt", "finish", "evaluate")
FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jsonl", "*.gguf", "*.arrow", "*tfevents*")


@dataclass(frozen=True)
class StageRecord:
    """What a stage took. Peaks are of this process and of the largest tool it ran."""

    name: str
    fingerprint: str
    seconds: float
    peak_memory_bytes: int
    peak_gpu_bytes: int | None  # None: no GPU is visible
    skipped: bool


class Stages:
    """The stages of one job under one work folder; `records` fills in the order they ran."""

    def __init__(self, work_dir: Path, resume: ResumeConfig | None = None) -> None:
        self.work_dir = work_dir
        self.resume = resume or ResumeConfig()
        self.owner: Owner | None = None
        self.mirror: Mirror | None = None
        self.needs: dict[str, int] = {}  # bytes on the disk, by stage
        self.used: list[str] = []
        self.folders: list[Path] = []  # those of `used` that are there, and stay
        self.records: list[StageRecord] = []
        self.facts: dict[str, Facts] = {}  # stage to what its artifact says was measured

    def belong_to(self, output: str, run_id: str, owner: Owner | None = None) -> None:
        """From now on what is done is copied to the run's place in `resume.uri`, else in `output`, and taken from there
        if it is not here."""
        self.owner = owner
        if uri := place_of_copies(self.resume, output):
            self.mirror = Mirror(uri, run_id, owner)

    def forget(self) -> None:
        """For when the run is released: nobody goes on from its copies, and they cost money."""
        if self.mirror and not self.resume.keep:
            with tolerated("the copies of finished stages are not removed from the output"):
                self.mirror.remove()

    def run(self, stage: Callable[..., Artifact], *inputs: Any, outside: str = "", **context: Any) -> Artifact:
        """`stage(*inputs, **context, out=folder)`, or what it returned last time for the same fingerprint.

        `outside` identifies inputs that are not artifacts: files of the user, a model on a hub. A stage that can go
        on in the middle is also given its `checkpoints`.
        """
        name, kind = stage.__name__, get_type_hints(stage)["return"]
        fingerprint = fingerprint_of(name, (*inputs, outside), context)
        place = f"{name}/{fingerprint[:16]}"
        out = self.work_dir / place
        checkpoints = Checkpoints(Path(f"{out}.checkpoints"), self.resume, self.mirror, f"{place}/training")
        artifact: Artifact
        self.used.append(place)
        if done := self._done(place, kind):
            artifact, record = done
            self.folders.append(out)
            touch(out)
            log.info("%s: already done (%.1f s then), skipped", name, record.seconds)
        else:
            if self.owner:
                self.owner.require_not_overtaken()
            clear(out)
            out.mkdir(parents=True)
            self.folders.append(out)
            given = {"checkpoints": checkpoints} if "checkpoints" in inspect.signature(stage).parameters else {}
            with (
                errors_translated(out, self.folders),
                signals.patient() if given and checkpoints.wanted else nullcontext(),
            ):
                log.info("%s: started", name)
                with Meter() as meter, device_errors(name), heap.reused():
                    artifact = stage(*inputs, **context, **given, out=out)
                record = StageRecord(name, fingerprint, meter.seconds, meter.peak_bytes, meter.peak_gpu_bytes, False)
                write_marker(out, artifact, kind, record)
            gib = record.peak_memory_bytes / 1024**3
            log.info("%s: done in %.1f s, peak memory %.2f GiB", name, record.seconds, gib)
        self._copy(place)
        if checkpoints.folder.exists():
            checkpoints.clear()
        self.records.append(record)
        self.facts[name] = getattr(artifact, "facts", {})
        return artifact

    def _done(self, place: str, kind: Any) -> tuple[Any, StageRecord] | None:
        out = self.work_dir / place
        if done := read_marker(out, kind):
            return done
        make_room(self.work_dir, self.needs.get(place.partition("/")[0], 0), self.used)
        if self._is_copied(place) and self.mirror and self.mirror.fetch(f"{place}/result", out, FILES):
            return read_marker(out, kind)
        return None

    def _copy(self, place: str) -> None:
        if self._is_copied(place) and self.mirror:
            with tolerated(f"{place} is not copied to the output, a start on another machine will do it again"):
                if not self.mirror.holds(f"{place}/result"):
                    self.mirror.save(self.work_dir / place, f"{place}/result")

    def _is_copied(self, place: str) -> bool:
        return self.mirror is not None and place.partition("/")[0] in COPIED


def place_of_copies(resume: ResumeConfig, output: str) -> str | None:
    """Where copies of what is done go; None if none are wanted."""
    uri = resume.uri or output
    wanted = resume.upload == "always" or (resume.upload == "auto" and scheme_of(uri) not in ("", "file"))
    return uri if wanted else None


def fingerprint_of(name: str, inputs: tuple[Any, ...], context: dict[str, Any]) -> str:
    facts = [
        name,
        code_digest(),
        [identity(value) for value in inputs],
        {key: identity(value) for key, value in context.items()},
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def identity(value: Any) -> Any:
    """What of an input decides the result: hashes of artifacts, values of settings; never a path."""
    if hasattr(value, "identity"):
        return value.identity
    if hasattr(value, "sha256"):
        return value.sha256
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [identity(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {key: identity(item) for key, item in vars(value).items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a stage input of type {type(value).__name__} has no identity")


@cache
def code_digest() -> str:
    """Hash of the pipeline's own source: other code may give another result, so it skips nothing."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def write_marker(out: Path, artifact: Any, kind: Any, record: StageRecord) -> None:
    """Seals `out` with the artifact, its paths relative to `out`: a work folder may move, or lie in a bucket."""
    inside = with_paths(artifact, lambda path: path.relative_to(out))
    seal(out, {"record": asdict(record), "artifact": TypeAdapter(kind).dump_python(inside, mode="json")})


def read_marker(out: Path, kind: Any) -> tuple[Any, StageRecord] | None:
    """The finished stage in `out`; None when it is not there, torn, or its files have changed."""
    sealed = opened(out)
    if sealed is None:
        return None
    try:
        record = StageRecord(**{**sealed.content["record"], "skipped": True})
        artifact = TypeAdapter(kind).validate_python(sealed.content["artifact"])
        return with_paths(artifact, lambda path: within(out, path)), record
    except (ValueError, KeyError, TypeError) as e:
        log.warning("%s is passed over: its marker is of another make (%s)", out, type(e).__name__)
        return None


def with_paths(value: Any, change: Callable[[Path], Path]) -> Any:
    """An artifact with every path in it changed."""
    if isinstance(value, Path):
        return change(value)
    if isinstance(value, tuple):
        return tuple(with_paths(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: with_paths(getattr(value, field.name), change) for field in fields(value)})
    return value


def within(out: Path, path: Path) -> Path:
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{path} lies outside of the stage's folder")
    return out / path
