"""Copies of sealed folders in the output, under runs/<run_id>/checkpoints/, for a start on an empty disk."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipeline.artifacts import ReleasedFile
from pipeline.disk import clear
from pipeline.errors import DataError, InputMissing, QuotesmithError
from pipeline.foreign_folder import check_foreign
from pipeline.manifest import describe
from pipeline.publish import put_object
from pipeline.sealed import MARKER, Seal, SealedFile, clear_up, matches, parsed
from pipeline.storage import open_store
from pipeline.storage.local import TEMPORARY, sync

log = logging.getLogger(__name__)


class Owner(Protocol):
    """What a start holds of its run; another one that has taken it over goes on from the copies."""

    def require_held(self) -> None:
        """Raises if the run is not surely this process's."""

    def require_not_overtaken(self) -> None:
        """Raises `TryLater` if it is surely another's. Asks nobody."""


class Mirror:
    """Each folder lies under a name of its own: the files by their hashes, then COMMIT.json.

    A copy whose marker is missing does not exist. Methods raise the errors of `storage.Store`, and those that write
    also what the `owner` of the run raises.
    """

    def __init__(self, output: str, run_id: str, owner: Owner | None = None) -> None:
        self.output, self.run_id = output, run_id
        self.store, self.owner = open_store(output), owner
        self.root = f"runs/{run_id}/checkpoints"

    def save(self, folder: Path, name: str) -> None:
        """A copy of the sealed `folder`. What is there already is not sent again."""
        for file in described(folder):
            self._require_held()
            put_object(self.store, self._object(name, file.sha256), folder / file.name, file)
        self._require_held()
        self.store.put(self._marker(name), folder / MARKER)

    def fetch(self, name: str, to: Path, allowed: Sequence[str]) -> bool:
        """Whether `to` is now the folder as it was saved, every hash and header checked; if not, it stays as it is.

        A copy that is damaged or larger than the disk, or holds a file whose last name fits none of the patterns
        `allowed`, is passed over with a line in the log: the work can be done again. A bucket that does not answer is
        an error all the same, for a later start may spare that work.
        """
        if not self.holds(name):
            return False
        clear_up(to.parent)
        temporary = to.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            data = self.store.read(self._marker(name))
            self._fill(temporary, name, parsed(data), allowed)
            check_foreign(temporary)
            (temporary / MARKER).write_bytes(data)
            for path in (temporary / MARKER, *[path for path in temporary.rglob("*") if path.is_dir()], temporary):
                sync(path)
            clear(to)
            temporary.rename(to)
            sync(to.parent)
        except (ValueError, InputMissing, DataError) as e:
            log.warning("%s/%s is passed over: %s", self.store.uri, self._marker(name), e)
            return False
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def holds(self, name: str) -> bool:
        return self.store.stat(self._marker(name)) is not None

    def names(self, prefix: str) -> list[str]:
        """Of the whole folders below `prefix`, sorted."""
        found = (name for name, _ in self.store.list(self._below(prefix)) if name.endswith(f"/{MARKER}"))
        return [name.removeprefix(f"{self.root}/").removesuffix(f"/{MARKER}") for name in found]

    def remove(self, prefix: str = "") -> None:
        """Every folder at or below `prefix`; the markers first, so that none stands for files that are gone."""
        names = [name for name, _ in self.store.list(self._below(prefix))]
        self._require_held()
        for name in sorted(names, key=lambda name: not name.endswith(MARKER)):
            self.store.remove(name)

    def require_not_overtaken(self) -> None:
        if self.owner:
            self.owner.require_not_overtaken()

    def _require_held(self) -> None:
        if self.owner:
            self.owner.require_held()

    def _fill(self, folder: Path, name: str, sealed: Seal, allowed: Sequence[str]) -> None:
        folder.mkdir(parents=True)
        needed, free = sum(file.size for file in sealed.files.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(f"it has {needed} bytes, but the disk has {free} left")
        for file, expected in sealed.files.items():
            if not any(fnmatch(PurePosixPath(file).name, pattern) for pattern in allowed):
                raise ValueError(f"it lists {file}, which is no file that this job makes")
            self._get(self._object(name, expected.sha256), folder / file, expected)

    def _get(self, name: str, to: Path, expected: SealedFile) -> None:
        found = self.store.stat(name)
        if found is None or found.size != expected.size:  # looked at first: it could fill the disk
            raise ValueError(f"{name} is gone or has another size than its marker says")
        self.store.get(name, to)
        if not matches(to, expected):
            raise ValueError(f"{name} has another hash than its marker says")

    def _below(self, prefix: str) -> str:
        return f"{self.root}/{prefix}/" if prefix else f"{self.root}/"

    def _object(self, name: str, sha256: str) -> str:
        return f"{self.root}/{name}/sha256/{sha256}"

    def _marker(self, name: str) -> str:
        return f"{self.root}/{name}/{MARKER}"


def described(folder: Path) -> list[ReleasedFile]:
    """Its files, each read once; InputMissing unless all are as the marker says."""
    try:
        sealed = parsed((folder / MARKER).read_bytes())
        found = [describe(name, folder / name) for name in sealed.files]
    except (OSError, ValueError) as e:
        raise InputMissing(f"{folder} is not whole, so it is not copied; run again") from e
    for file in found:
        if sealed.files[file.name] != SealedFile(sha256=file.sha256, size=file.size_bytes):
            raise InputMissing(f"{folder} is not whole, so it is not copied: {file.name} has changed; run again")
    return found


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Around what a job can do without: it goes on when the bucket fails, and says so."""
    try:
        yield
    except (QuotesmithError, OSError) as e:
        log.warning("%s: %s", what, e)
