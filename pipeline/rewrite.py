"""GGUF files to files of the same names, sizes and tensor types, with other values in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.artifacts import Facts, GgufFile, GgufSet, sha256_of
from pipeline.checkpoints import Checkpoints
from pipeline.errors import CheckFailed
from pipeline.gguf_file import GgufContents

Change = Callable[[Path, Checkpoints | None], Facts]


def rewrite(
    files: GgufSet,
    what: str,
    reason_to_leave: Callable[[GgufFile], str | None],
    change: Change,
    out: Path,
    checkpoints: Checkpoints | None,
) -> GgufSet:
    """A copy of each file in `out`, changed in place, with the facts of that under `what`, or why it was left alone."""
    found = []
    for file in files.files:
        path = out / file.path.name
        shutil.copyfile(file.path, path)
        if reason := reason_to_leave(file):
            facts: Facts = {"reason": reason}
        else:
            facts = change(path, checkpoints.part(path.name) if checkpoints else None)
        found.append(described(file, path, what, facts))
    return GgufSet(tuple(found))


def described(before: GgufFile, path: Path, what: str, facts: Facts) -> GgufFile:
    """The rewritten file; `CheckFailed` unless it has the size and the types it had.

    Its facts are its own: those of `before` are not all in its bytes, which alone decide whether this stage is skipped.
    """
    found = GgufContents(path).describe()
    size = path.stat().st_size
    if size != before.size_bytes or found["tensor_types"] != before.facts["tensor_types"]:
        raise CheckFailed(f"{what} changed the size or the types of {path.name}; this is a bug")
    return GgufFile(path, sha256_of(path), size, before.type, found | {what: facts})
