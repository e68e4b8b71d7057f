"""Bucket to corpus: find the input files, read their quotes, drop blanks and duplicates.

`resolve` finds the files and `fetch` reads them. To know whether fetch is already done for them, compare their
`content_hash`: it changes whenever a file's content does, and it downloads nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import TextIO

from pipeline.artifacts import Corpus, Source, sha256_of
from pipeline.config import DEFAULT_FILES, DataConfig
from pipeline.errors import ConfigError, DataError, InputMissing, TryLater
from pipeline.progress import bar
from pipeline.quotes import fold, read_quotes
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


def fetch(inputs: Sequence[Input], cfg: DataConfig, *, out: Path) -> Corpus:
    """Every distinct quote of the inputs in `out`/quotes.jsonl, in the order read; the first of duplicates stays.

    Memory: two hashes for each distinct quote, about 200 bytes. InputMissing (66) names a file that is not there,
    DataError (65) one that is empty, not UTF-8 text or without a quote, TryLater (75) one that is no longer what
    `content_hash` was made of.
    """
    seen: dict[bytes, bytes] = {}
    path = out / "quotes.jsonl"
    with translated(path), path.open("w", encoding="utf-8") as file:
        sources = tuple(take(source, cfg, seen, file, out) for source in bar(inputs, "fetch"))
    corpus = Corpus(path, sha256_of(path), sources)
    log.info("fetch: %s", summary(corpus))
    return corpus


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


def take(source: Input, cfg: DataConfig, seen: dict[bytes, bytes], file: TextIO, out: Path) -> Source:
    """Append the file's new quotes to `file`."""
    if source.size_bytes == 0:
        raise DataError(f"{source.uri} is empty; a file with quotes is needed")
    if source.size_bytes > cfg.max_file_bytes:
        raise DataError(f"{source.uri} has {source.size_bytes} bytes; split it or raise data.max_file_bytes")
    counts: Counter[str] = Counter()
    with local_copy(source, out) as path, unchanged(source, path):
        for text in read_quotes(path, source.uri, cfg):
            key = fold(text)
            fate = judge(text, key, seen)
            counts[fate] += 1
            if fate == "kept":
                file.write(json.dumps({"text": text, "source": source.name, "key": key}, ensure_ascii=False) + "\n")
        sha256 = sha256_of(path)
    if counts.total() == counts["blank"]:
        raise DataError(f"{source.uri} holds no quote, only {counts['blank']} blank lines; add text to it")
    return Source(
        name=source.name,
        uri=source.uri,
        sha256=sha256,
        size_bytes=source.size_bytes,
        found=counts.total() - counts["blank"],
        blank=counts["blank"],
        exact_duplicates=counts["exact"],
        near_duplicates=counts["near"],
        kept=counts["kept"],
    )


@contextmanager
def unchanged(source: Input, path: Path) -> Iterator[None]:
    """TryLater, if the file that is read in the block is afterwards not what it was when it was looked at first.

    Else the quotes would go under the name of others. What reading made of a half-written file is not the user's error.
    """
    before = source.first_checksum

    def require() -> None:
        if path.stat().st_size != source.size_bytes or checksum(source) != before:
            raise TryLater(f"{source.uri} changed while it was read; run again when nobody writes to it")

    try:
        yield
    except DataError:
        require()
        raise
    require()


def judge(text: str, key: str, seen: dict[bytes, bytes]) -> str:
    """blank, kept, or a duplicate: exact if the text equals the kept quote's, near if only the folded text does."""
    if not key:
        return "blank"
    text_hash, key_hash = (hashlib.blake2b(part.encode(), digest_size=16).digest() for part in (text, key))
    if key_hash not in seen:
        seen[key_hash] = text_hash
        return "kept"
    return "exact" if seen[key_hash] == text_hash else "near"


@contextmanager
def local_copy(source: Input, out: Path) -> Iterator[Path]:
    """The file itself, or the object downloaded for as long as it is read."""
    if isinstance(source.place, Path):
        yield source.place
        return
    store, key = source.place
    path = out / "download"
    try:
        store.get(key, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


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


def summary(corpus: Corpus) -> str:
    def total(count: Callable[[Source], int]) -> int:
        return sum(count(source) for source in corpus.sources)

    return (
        f"{corpus.quotes} of {total(lambda s: s.found)} quotes kept from {len(corpus.sources)} files; dropped "
        f"{total(lambda s: s.exact_duplicates)} exact and {total(lambda s: s.near_duplicates)} near duplicates, "
        f"{total(lambda s: s.blank)} blank lines"
    )
