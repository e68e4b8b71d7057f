"""A folder as a bucket. A write goes to a temporary name beside the target, is synced, then renamed or linked
into place: a crash leaves the old object or the new one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline import process
from pipeline.disk import as_machine_error
from pipeline.errors import (
    ConfigError,
    InputMissing,
    MachineError,
    NotAllowed,
    QuotesmithError,
    TransferError,
)
from pipeline.storage import (
    CHUNK_BYTES,
    PROBE,
    Stat,
    check_listed,
    check_name,
    check_prefix,
    check_readable,
    crc32c_of,
    probe_name,
    scheme_of,
)

TEMPORARY = ".writing-"  # and who writes, by `process.signature`, and a name that is drawn
ABANDONED_SECONDS = 3600.0  # without a byte written; a writer renames its file right after the last one
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG)  # of this process: another place would not help
KIND = {
    errno.ENOENT: InputMissing,
    errno.EACCES: NotAllowed,
    errno.EPERM: NotAllowed,
    errno.EROFS: NotAllowed,
    errno.ENOSPC: MachineError,
    errno.EDQUOT: MachineError,
    errno.ENOTDIR: ConfigError,
    errno.EISDIR: ConfigError,
    errno.EEXIST: ConfigError,
    errno.ENAMETOOLONG: ConfigError,
}


def open_store(uri: str) -> LocalStore:
    return LocalStore(local_path(uri))


def local_path(uri: str) -> Path:
    """The path behind a plain path or a file:// URI; ConfigError if it names another host."""
    if scheme_of(uri) != "file":
        return Path(os.path.expanduser(uri))  # noqa: PTH111  (Path.expanduser raises for an unknown user)
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ConfigError(f"{uri} does not name a local path; write file:///absolute/path")
    return Path(unquote(parts.path + (f"?{parts.query}" if parts.query else "")))


class LocalStore:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def stat(self, name: str) -> Stat | None:
        """ConfigError where something stands that is no file: no object is there, and none can be written."""
        path = self._path(name)
        with translated(path), suppress(FileNotFoundError, NotADirectoryError):  # perhaps removed just now
            refuse_other_than_file(path)
            return Stat(path.stat().st_size, version_of(path), crc32c=crc32c_of(path))
        return None

    def get(self, name: str, to: Path) -> None:
        path = self._path(name)
        with translated(path, to), written(to) as temporary:
            copy(path, temporary)
            temporary.replace(to)

    def read(self, name: str) -> bytes:
        path = self._path(name)
        with translated(path):
            check_readable(path.stat().st_size, str(path))
            return path.read_bytes()

    def put(self, name: str, path: Path) -> None:
        target = self._path(name)
        with translated(target), written(target) as temporary:
            copy(path, temporary)
            temporary.replace(target)

    def put_if_absent(self, name: str, data: bytes | Path) -> bool:
        target = self._path(name)
        with translated(target), written(target) as temporary:
            fill(temporary, data)
            return link(temporary, target)

    def compare_and_swap(self, name: str, data: bytes, expected_version: str | None) -> bool:
        if expected_version is None:
            return self.put_if_absent(name, data)
        target = self._path(name)
        with translated(target), written(target) as temporary, locked(target.parent):
            fill(temporary, data)
            if not target.exists() or version_of(target) != expected_version:
                return False
            temporary.replace(target)
            return True

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        folder = self.root / check_prefix(prefix).rpartition("/")[0]
        with translated(folder):
            paths = [path for path in folder.rglob("*") if path.is_file()]
            names = {path.relative_to(self.root).as_posix(): path for path in paths}
            for name in sorted(names):
                if name.startswith(prefix) and not names[name].name.startswith(TEMPORARY):
                    yield check_listed(name, self.uri), names[name].stat().st_size

    def remove(self, name: str) -> None:
        """Its folder stays, even empty: another writer may just have made it for a file of its own."""
        path = self._path(name)
        with translated(path):
            path.unlink(missing_ok=True)

    def clear_up(self, folder: str) -> None:
        top = (path for kind in (TEMPORARY, PROBE) for path in self.root.glob(f"{kind}*"))
        for path in (*top, *self._path(folder).rglob(f"{TEMPORARY}*")):
            with suppress(OSError):
                if is_abandoned(path):
                    path.unlink()

    def probe(self) -> None:
        name = probe_name()
        try:
            self.put_if_absent(name, b"probe")
            if self.read(name) != b"probe":
                raise TransferError(f"{self.uri} did not give back what was written to it; check the disk")
        finally:
            with translated(self.root):
                self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.root / check_name(name)


def is_abandoned(temporary: Path) -> bool:
    """Whether its writer was surely killed: seen on its own machine and in its own container, else by time."""
    writer = temporary.name.removeprefix(TEMPORARY).removeprefix(PROBE).partition("_")[0]
    return process.is_gone_signature(writer) or time.time() - temporary.stat().st_mtime > ABANDONED_SECONDS


def version_of(path: Path) -> str:
    found = path.stat()
    return f"{found.st_mtime_ns}-{found.st_ino}-{found.st_size}"


@contextmanager
def translated(*paths: Path) -> Iterator[None]:
    """The operating system's errors as ours, each naming its path."""
    try:
        yield
    except OSError as e:
        where = e.filename or paths[-1]
        kind = KIND.get(e.errno or 0, TransferError)
        if e.errno in LIMITS and (machine := as_machine_error(e, where)):
            raise machine from e
        raise kind(f"{where}: {e.strerror or e}; {CURES.get(kind, 'check the disk and try again')}") from e


CURES: dict[type[QuotesmithError], str] = {
    InputMissing: "check the path",
    NotAllowed: "give this user the right to it or choose another folder",
    MachineError: "free some space or choose another folder",
    ConfigError: "a folder was needed there; choose another name",
}


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """A temporary name in the target's folder, gone afterwards. The folder is synced, so a rename lasts."""
    make_folder(target.parent)
    temporary = target.parent / f"{TEMPORARY}{process.signature()}_{uuid.uuid4().hex}"
    try:
        yield temporary
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """With its parents; those that are new outlast a power cut as the file will."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        with suppress(PermissionError):  # a folder that can be written but not read
            sync(path.parent)


def fill(temporary: Path, data: bytes | Path) -> None:
    if isinstance(data, Path):
        return copy(data, temporary)
    temporary.write_bytes(data)
    sync(temporary)


def copy(source: Path, to: Path) -> None:
    with source.open("rb") as reader, to.open("xb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK_BYTES)
    sync(to)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(temporary: Path, target: Path) -> bool:
    """Give the finished file its name unless the name is taken; ConfigError if it is, and not by a file."""
    try:
        os.link(temporary, target)
        return True
    except FileExistsError:
        pass
    except OSError as e:
        if e.errno not in NO_HARD_LINKS:
            raise
        with locked(target.parent):  # a mounted drive without hard links
            if not target.exists():
                temporary.replace(target)
                return True
    with suppress(FileNotFoundError):  # perhaps removed just now
        refuse_other_than_file(target)
    return False


def refuse_other_than_file(path: Path) -> None:
    """ConfigError for a folder, a link to nothing and the like, where nobody could ever write an object."""
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or (stat.S_ISLNK(mode) and path.is_file())):
        raise ConfigError(
            f"{path} is a folder, a link to nothing or a device, and a file was needed there; move it away or choose "
            "another place"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time in `folder`, as far as its file system can lock (some network drives cannot)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
