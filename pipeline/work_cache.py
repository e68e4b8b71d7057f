"""The work folder as a cache: what older jobs left stays as long as there is room, for the next may want it again."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from pipeline.sealed import MARKER

log = logging.getLogger(__name__)

# Nothing else in the work folder is ours to remove: it can be a folder of somebody's.
OURS = re.compile(r"[0-9a-f]{16}(\.checkpoints)?")


def make_room(work_dir: Path, needed: int, used: Collection[str]) -> None:
    """Removes folders of stages, those used longest ago first, until `needed` bytes are free or none is left.

    `used` are the folders of this job, as `stage/fingerprint`. What is not among them when a stage begins belongs to
    other settings: this job's later stages cannot be done before their input is.
    """
    for folder in sorted(others(work_dir, used), key=last_used):
        if shutil.disk_usage(work_dir).free >= needed:
            return
        log.info("disk: %.1f MB are needed in %s; an older job's %s is removed", needed / 1e6, work_dir, place(folder))
        (folder / MARKER).unlink(missing_ok=True)  # first, so that a kill in between leaves no whole folder
        shutil.rmtree(folder, ignore_errors=True)


def others(work_dir: Path, used: Collection[str]) -> list[Path]:
    found = (path for path in work_dir.glob("*/*") if path.is_dir() and OURS.fullmatch(path.name))
    return [path for path in found if place(path).removesuffix(".checkpoints") not in used]


def place(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def last_used(folder: Path) -> float:
    """`touch` says when a finished stage was used, the folder itself when an unfinished one was written to."""
    marker = folder / MARKER
    return (marker if marker.exists() else folder).stat().st_mtime


def touch(folder: Path) -> None:
    (folder / MARKER).touch()
