"""What `input` names to the files behind it: in folders and buckets, by name, pattern or default.

`content_hash` tells whether they are still those that were read: it changes whenever a file's content does, and it
downloads nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from glob import glob
from pathlib import Path

from pipeline.artifacts import sha256_of
from pipeline.config import DEFAULT_FILES, DataConfig
from pipeline.errors import ConfigError, DataError, InputMissing
from pipeline.storage import Store, check_listed, open_store, scheme_of
from pipeline.storage.local import local_path, translated

log = logging.getLogger(__name__)

SAMPLE = Path(__file__).parent / "sample"
TEXT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".txt.gz", ".jsonl.gz", ".ndjson.gz")
GLOB_CHARS = frozenset("*?[")


@dataclass(frozen=True)
class Input:
    """One file to read; `place` is a local path with links resolved, or a name in a store."""

    name: str  # unique among the inputs
    uri: str
    size_bytes: int
    place: Path | tuple[Store, str]

    @property
    def identity(self) -> str:
        """Of the name alone; `content_hash` tells what is in it."""
        return self.uri

    @cached_property
    def first_checksum(self) -> str:
        """As it was when it was first asked for: what stages and runs are named by."""
        return checksum(self)


def resolve(inputs: Sequence[str], cfg: DataConfig) -> list[Input]:
    """The files behind the inputs, in the given order, each once; without inputs the embedded sample's."""
    if not inputs:
        log.info("fetch: no input given, so the embedded sample corpus of invented voices is used")
        inputs = (str(SAMPLE),)
    found: dict[str, Input] = {}
    for given in inputs:
        if not given.strip():
            raise ConfigError("an input is empty text; give a file, a folder or a bucket's URI, or leave it out")
        is_local = scheme_of(given) in ("", "file")
        for source in local_inputs(given, cfg) if is_local else remote_inputs(given, cfg):
            identity = str(source.place) if isinstance(source.place, Path) else source.uri
            if identity in found:
                log.warning("fetch: %s is named twice and read once", source.uri)
            found.setdefault(identity, source)
    return with_unique_names(list(found.values()))


def content_hash(sources: Sequence[Input]) -> str:
    """A hash of what the files hold and of their order: SHA-256 of local files, a bucket's own checksums of objects.

    The same text has another hash in a bucket than in a folder; only `Source.sha256` is equal in both.
    """
    lines = "\n".join(f"{source.name} {source.size_bytes} {source.first_checksum}" for source in sources)
    return hashlib.sha256(lines.encode()).hexdigest()


def checksum(source: Input) -> str:
    if isinstance(source.place, Path):
        with translated(source.place):
            return sha256_of(source.place)
    store, key = source.place
    found = store.stat(key)
    if found is None:
        raise InputMissing(f"{source.uri} has been deleted meanwhile; start again")
    return found.md5 or found.crc32c or found.version


def local_inputs(given: str, cfg: DataConfig) -> list[Input]:
    path = local_path(given)
    with translated(path):
        if path.is_dir():
            deep = any("/" in pattern for pattern in cfg.files)
            inside = path.rglob("*") if deep else path.iterdir()
            names = [file.relative_to(path).as_posix() for file in inside if file.is_file()]
            return [local_input(path / name) for name in choose(names, cfg.files, given)]
        if path.is_file():
            return [local_input(path)]
        if path.exists():
            raise DataError(f"{given} is neither a file nor a folder; a file with quotes is needed")
        # Path.glob takes no absolute pattern.
        matches = sorted(Path(match) for match in glob(str(path), recursive=True))  # noqa: PTH207
        files = [local_input(match) for match in matches if match.is_file()]
    if files:
        return files
    raise missing(given)


def local_input(path: Path) -> Input:
    return Input(path.name, str(path.absolute()), path.stat().st_size, path.resolve())


def remote_inputs(given: str, cfg: DataConfig) -> list[Input]:
    scheme, _, rest = given.partition("://")
    bucket, _, key = rest.partition("/")
    root = f"{scheme.lower()}://{bucket}"
    store = open_store(root)

    def remote_input(key: str, size: int) -> Input:
        return Input(key.rpartition("/")[2], f"{root}/{key}", size, (store, key))

    if key and not key.endswith("/"):
        found = store.stat(key)
        if found:
            return [remote_input(key, found.size)]
        if GLOB_CHARS & set(key):
            fixed = key[: min(key.index(char) for char in GLOB_CHARS & set(key))]
            matches = [(name, size) for name, size in store.list(fixed) if matches_path(name, key)]
            if not matches:
                raise missing(given)
            return [remote_input(name, size) for name, size in matches]
    prefix = f"{key.rstrip('/')}/" if key else ""
    sizes = {name.removeprefix(prefix): size for name, size in store.list(prefix)}
    if not sizes:
        raise missing(given)
    return [remote_input(prefix + name, sizes[name]) for name in choose(list(sizes), cfg.files, given)]


def missing(given: str) -> InputMissing:
    if GLOB_CHARS & set(given):
        return InputMissing(f"{given} matches no file; check the pattern")
    return InputMissing(f"{given} does not exist; give a file, a folder or prefix with files in it, or a glob")


def choose(names: Sequence[str], wanted: Sequence[str], folder: str) -> list[str]:
    """The wanted files among a folder's `names`. With the default list and none of it there: every text file.

    InputMissing if any is missing: training on the rest would pass for success.
    """
    chosen = {pattern: matching(names, pattern) for pattern in wanted}
    lacking = [pattern for pattern, matches in chosen.items() if not matches]
    if not lacking:
        return list(dict.fromkeys(name for matches in chosen.values() for name in matches))
    texts = sorted(name for name in names if "/" not in name and name.lower().endswith(TEXT_SUFFIXES))
    if tuple(wanted) == DEFAULT_FILES and len(lacking) == len(wanted) and texts:
        return texts
    held = ", ".join(sorted(names)[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    raise InputMissing(f"{folder} lacks {' and '.join(lacking)}; it holds {held or 'no files'}; set data.files")


def matching(names: Sequence[str], pattern: str) -> list[str]:
    if pattern in names:
        return [pattern]
    return sorted(name for name in names if matches_path(name, pattern))


def matches_path(name: str, pattern: str) -> bool:
    """As a shell's glob: `*` stays within a folder, `**` crosses folders."""

    def match(parts: list[str], patterns: list[str]) -> bool:
        if not patterns:
            return not parts
        if patterns[0] == "**":
            return any(match(parts[skip:], patterns[1:]) for skip in range(len(parts) + 1))
        return bool(parts) and fnmatchcase(parts[0], patterns[0]) and match(parts[1:], patterns[1:])

    return match(name.split("/"), pattern.split("/"))


def with_unique_names(sources: Sequence[Input]) -> list[Input]:
    """Files of one name from several folders become "x.txt", "x.txt (2)", …"""
    times: Counter[str] = Counter()
    named = []
    for source in sources:
        times[source.name] += 1
        if not is_utf8(source.uri):
            raise DataError(f"the name of {source.uri!a} is not UTF-8; rename the file")
        check_listed(source.name, source.uri.removesuffix(f"/{source.name}"))
        again = f" ({times[source.name]})" if times[source.name] > 1 else ""
        named.append(replace(source, name=source.name + again))
    return named


def is_utf8(text: str) -> bool:
    """Not when it holds bytes of a file name that could not be decoded."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
