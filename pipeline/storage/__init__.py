"""Buckets and folders behind one small protocol. A URI's scheme names the file that serves it (`gs.py`); no
scheme or `file://` means `local.py`. A new scheme is a new file with an `open_store(uri)` of its own."""

from __future__ import annotations

import base64
import importlib
import pkgutil
import re
import time
import unicodedata
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from pipeline import process
from pipeline.errors import ConfigError, DataError

CHUNK_BYTES = 1024 * 1024
LARGEST_READ = 64 * 1024 * 1024  # bytes of an object that is read into memory; markers, manifests and figures have less
PROBE = ".probe-"
PROBE_SECONDS = 3600.0  # after which surely nobody is about to read or remove it


@dataclass(frozen=True)
class Stat:
    """What a store knows of an object. Checksums are base64, as in gs://.

    `version` changes with every write, except on s3://, whose ETag is the same for the same bytes.
    """

    size: int
    version: str
    md5: str | None = None
    crc32c: str | None = None


class Store(Protocol):
    """Objects under one URI. Names are relative to it, with forward slashes.

    Every method raises NotAllowed (77), InputMissing (66), ServiceUnavailable (69), TransferError (74) or
    MachineError (71), never an error of the SDK or the operating system.
    """

    uri: str

    def stat(self, name: str) -> Stat | None:
        """None: there is no such object."""

    def get(self, name: str, to: Path) -> None:
        """Copy the object to a local file: checksummed, and complete or not there."""

    def read(self, name: str) -> bytes:
        """A small object's bytes; DataError (65) for one that is larger than `LARGEST_READ`."""

    def put(self, name: str, path: Path) -> None:
        """Write or overwrite; readers see the old object or the new one, never a part."""

    def put_if_absent(self, name: str, data: bytes | Path) -> bool:
        """True: written. False: an object of that name stands and is left alone. It can still be this very
        write, repeated on the way, so compare before calling it a conflict."""

    def compare_and_swap(self, name: str, data: bytes, expected_version: str | None) -> bool:
        """Write if the object still has that version (None: if there is none); False if it has not."""

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every object whose name begins so, at any depth, sorted by name."""

    def remove(self, name: str) -> None:
        """Delete the object; nothing happens if there is none."""

    def clear_up(self, folder: str) -> None:
        """Remove what writers that were killed left under temporary names, at the top and below `folder`."""

    def probe(self) -> None:
        """Create, read and delete a small object, so that a job without the right fails before it works."""


def open_store(uri: str) -> Store:
    """The store at `uri`: a folder, or a scheme that has a file here, else ConfigError."""
    scheme = scheme_of(uri)
    module = {"": "local", "file": "local"}.get(scheme, scheme)
    schemes = sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name != "local")
    if (module != "local" and module not in schemes) or scheme == "local":
        known = ", ".join(f"{name}://" for name in ["file", *schemes])
        raise ConfigError(f"{uri} has the unknown scheme {scheme}://; use a folder or one of {known}")
    if module != "local":
        check_address(uri)
    return cast(Store, importlib.import_module(f"pipeline.storage.{module}").open_store(uri))


def scheme_of(uri: str) -> str:
    """'gs' for gs://…, '' for a plain path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    return match[1].lower() if match else ""


def check_address(uri: str) -> None:
    """ConfigError for a bucket's URI that no service would take, or that holds what belongs into the environment."""
    if "@" in uri.partition("://")[2].partition("/")[0]:
        raise ConfigError(f"{uri} has a user in it; leave that out, credentials are found in the environment")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in uri):
        raise ConfigError(f"{uri!a} has a control character in it, or bytes that are not UTF-8; correct it")


def probe_name() -> str:
    return f"{PROBE}{process.signature()}_{time.time():.0f}_{uuid.uuid4().hex}"


def is_abandoned_probe(name: str) -> bool:
    """Whether its writer was surely killed: seen on its own machine and in its own container, else by the time in the
    name, which listings of buckets give for nothing."""
    writer, _, rest = name.removeprefix(PROBE).partition("_")
    written = re.match("([0-9]{1,12})_", rest)
    age_seconds = time.time() - int(written[1] if written else 0)
    return process.is_gone_signature(writer) or abs(age_seconds) > PROBE_SECONDS


def check_name(name: str) -> str:
    """`name`, or ConfigError if it could leave the store's root or be misread by it."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ConfigError(f"{name!r} cannot be an object's name: absolute, or it has an empty, . or .. part")
    if any(unicodedata.category(char) == "Cc" for char in name):
        raise ConfigError(f"{name!r} cannot be an object's name: it has a control character")
    return name


def check_prefix(prefix: str) -> str:
    """`prefix`, or ConfigError if its folder part could leave the root; its last part can be cut anywhere."""
    if "/" in prefix:
        check_name(prefix.rpartition("/")[0])
    return prefix


def check_listed(name: str, uri: str) -> str:
    """`name`, or DataError if an object is called so that no file can be: it is refused, not passed over."""
    try:
        return check_name(name)
    except ConfigError as e:
        raise DataError(f"{uri} holds an object that cannot be used: {e}; rename or delete it") from e


def check_readable(size: int, uri: str) -> None:
    """DataError for an object that would fill the memory."""
    if size > LARGEST_READ:
        raise DataError(
            f"{uri} has {size} bytes; needed at most {LARGEST_READ}, for this job never writes a larger one"
        )


class Crc32c:
    """A running CRC-32C; `text` is base64 of its big-endian bytes, the form in which gs:// and s3:// report it."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, chunk: bytes) -> None:
        import google_crc32c

        self.value = google_crc32c.extend(self.value, chunk)

    def text(self) -> str:
        return base64.b64encode(self.value.to_bytes(4, "big")).decode()


def crc32c_of(path: Path) -> str:
    checksum = Crc32c()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum.update(chunk)
    return checksum.text()
