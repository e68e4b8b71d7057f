"""A folder that is whole or does not count: COMMIT.json, written last, has the hash and size of every other file."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipeline.artifacts import sha256_of
from pipeline.errors import ConfigError
from pipeline.storage import check_name
from pipeline.storage.local import TEMPORARY, sync, written

log = logging.getLogger(__name__)

MARKER = "COMMIT.json"


def no_marker(name: str) -> str:
    if name == MARKER:
        raise ValueError("a marker does not list itself")
    return name


class SealedFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Seal(BaseModel):
    """What a marker says. `files` are by their path in the folder, `content` is the maker's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[Annotated[str, AfterValidator(check_name), AfterValidator(no_marker)], SealedFile]
    content: dict[str, Any]


def seal(folder: Path, content: dict[str, Any]) -> Seal:
    """Marks `folder` as whole. Everything is synced first: a marker must not outlive a power cut that its files do not.

    Raises `OSError`, and leaves no marker then.
    """
    files = {}
    (folder / MARKER).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = SealedFile(sha256=sha256_of(path), size=path.stat().st_size)
    sealed = Seal(files=files, content=content)
    with written(folder / MARKER) as temporary:
        temporary.write_text(sealed.model_dump_json(), encoding="utf-8")
        sync(temporary)
        temporary.replace(folder / MARKER)
    sync(folder.parent)
    return sealed


def opened(folder: Path) -> Seal | None:
    """The marker's content if every file is as it says; None without a marker, and with a line in the log if not."""
    if not (folder / MARKER).exists():
        return None
    try:
        sealed = parsed((folder / MARKER).read_bytes())
        altered = next((name for name, file in sealed.files.items() if not matches(folder / name, file)), None)
    except (OSError, ValueError) as e:
        log.warning("%s is passed over: its marker cannot be read (%s)", folder, type(e).__name__)
        return None
    if altered:
        log.warning("%s is passed over: %s is not as it was when it was written", folder, altered)
        return None
    return sealed


def clear_up(folder: Path) -> None:
    """Removes what a write in `folder` left that failed, or was killed."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def parsed(data: bytes) -> Seal:
    """Raises `ValueError` for what is no marker, or lists a file that could lie outside its folder."""
    try:
        return Seal.model_validate_json(data)
    except (ValueError, ConfigError) as e:
        raise ValueError(f"not a marker: {e}") from e


def matches(path: Path, file: SealedFile) -> bool:
    try:
        return path.stat().st_size == file.size and sha256_of(path) == file.sha256
    except OSError:
        return False
