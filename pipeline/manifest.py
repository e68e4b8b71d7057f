"""MANIFEST.json: what a release consists of. It is the commit point: no manifest, nothing published."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline import __version__
from pipeline.artifacts import Release, ReleasedFile, sha256_of
from pipeline.errors import DataError
from pipeline.foreign_text import printable
from pipeline.storage import check_listed, check_name, crc32c_of

SCHEMA_VERSION = 1
LONGEST_FINDING = 200  # characters
SHA256 = re.compile(r"[0-9a-f]{64}")
CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")  # compared as text


def manifest_name(run_id: str) -> str:
    return f"runs/{run_id}/MANIFEST.json"


def object_name(run_id: str, sha256: str) -> str:
    return f"runs/{run_id}/objects/sha256/{sha256}"


def created_at(seconds: float) -> str:
    """A time as releases have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def describe(name: str, path: Path) -> ReleasedFile:
    return ReleasedFile(check_name(name), sha256_of(path), crc32c_of(path), path.stat().st_size)


def result_digest(files: Iterable[ReleasedFile]) -> str:
    """SHA-256 over the names and hashes of the GGUF files: what makes two runs' results the same."""
    lines = sorted(f"{file.name} {file.sha256}" for file in files if file.name.endswith(".gguf"))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def to_bytes(run_id: str, name: str, created: str, files: Iterable[ReleasedFile]) -> bytes:
    files = sorted(files, key=lambda file: file.name)
    return as_json(
        {
            "schema_version": SCHEMA_VERSION,
            "run_id": run_id,
            "name": name,
            "created": created,
            "tool": {"name": "quotesmith", "version": __version__},
            "result_digest": result_digest(files),
            "objects": [asdict(file) for file in files],
        }
    )


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def from_bytes(data: bytes, output: str, run_id: str) -> Release:
    """The release behind a manifest; DataError if it is damaged or another run's."""
    where = f"{output.rstrip('/')}/{manifest_name(run_id)}"
    try:
        content = json.loads(data)
        version = content["schema_version"]
        files = tuple(TypeAdapter(ReleasedFile).validate_python(entry) for entry in content["objects"])
        release = Release(
            output=output,
            run_id=content["run_id"],
            name=content["name"],
            created=content["created"],
            result_digest=content["result_digest"],
            manifest_sha256=hashlib.sha256(data).hexdigest(),
            files=files,
        )
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(
            f"{where} is not a manifest of this program: {type(e).__name__} {printable(e, LONGEST_FINDING)}"
        ) from e
    if version != SCHEMA_VERSION:
        raise DataError(f"{where} has schema version {printable(version, 20)}; this program reads {SCHEMA_VERSION}")
    if release.run_id != run_id:
        said = printable(release.run_id, LONGEST_FINDING)
        raise DataError(f"{where} is the manifest of run {said}; it was copied from elsewhere")
    if not isinstance(release.created, str) or not CREATED.fullmatch(release.created):
        said = printable(release.created, LONGEST_FINDING)
        raise DataError(
            f"{where} has {said!r} for when it was created, not a time like {created_at(0)}; remove that run"
        )
    if release.result_digest != result_digest(files):
        raise DataError(f"{where} has a result_digest that does not match its own list of files")
    for file in files:
        if not SHA256.fullmatch(file.sha256):
            raise DataError(f"{where} has an impossible SHA-256 for {file.name!a}")
        check_listed(file.name, where)
    return release
