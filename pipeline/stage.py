"""Runs stages, times them, and skips what is done.

A stage's folder is named by its fingerprint: a hash of the code, its settings and the hashes of its inputs.
The marker DONE.json is written last and lists the hash of every file, so a folder without it, or with other
files, is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.artifacts import Facts, sha256_of
from pipeline.meter import Meter

log = logging.getLogger(__name__)

Artifact = TypeVar("Artifact")
MARKER = "DONE.json"


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

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self.records: list[StageRecord] = []
        self.facts: dict[str, Facts] = {}  # stage to what its artifact says was measured

    def run(self, stage: Callable[..., Artifact], *inputs: Any, outside: str = "", **context: Any) -> Artifact:
        """`stage(*inputs, **context, out=folder)`, or what it returned last time for the same fingerprint.

        `outside` identifies inputs that are not artifacts: files of the user, a model on a hub.
        """
        name, kind = stage.__name__, get_type_hints(stage)["return"]
        fingerprint = fingerprint_of(name, (*inputs, outside), context)
        out = self.work_dir / name / fingerprint[:16]
        done = read_marker(out, kind)
        artifact: Artifact
        if done:
            artifact, record = done
            self.records.append(record)
            self.facts[name] = getattr(artifact, "facts", {})
            log.info("%s: already done (%.1f s then), skipped", name, record.seconds)
            return artifact
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        log.info("%s: started", name)
        with Meter() as meter:
            artifact = stage(*inputs, **context, out=out)
        record = StageRecord(name, fingerprint, meter.seconds, meter.peak_bytes, meter.peak_gpu_bytes, False)
        write_marker(out, artifact, kind, record)
        self.records.append(record)
        self.facts[name] = getattr(artifact, "facts", {})
        gib = record.peak_memory_bytes / 1024**3
        log.info("%s: done in %.1f s, peak memory %.2f GiB", name, record.seconds, gib)
        return artifact


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
    files = {str(path.relative_to(out)): sha256_of(path) for path in sorted(out.rglob("*")) if path.is_file()}
    content = {
        "record": asdict(record),
        "artifact": TypeAdapter(kind).dump_python(artifact, mode="json"),
        "out": str(out),
        "files": files,
    }
    temporary = out / f"{MARKER}.tmp"
    with temporary.open("w") as file:
        json.dump(content, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(out / MARKER)


def read_marker(out: Path, kind: Any) -> tuple[Any, StageRecord] | None:
    """The finished stage in `out`; None when it is not there, torn, or its files have changed."""
    try:
        text = (out / MARKER).read_text()
        content = json.loads(text.replace(json.loads(text)["out"], str(out)))  # the work folder may have moved
        if any(sha256_of(out / name) != digest for name, digest in content["files"].items()):
            log.warning("%s: its files have changed since it finished; doing it again", out.parent.name)
            return None
        artifact = TypeAdapter(kind).validate_python(content["artifact"])
        return artifact, StageRecord(**{**content["record"], "skipped": True})
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None
