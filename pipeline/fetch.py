"""Bucket to corpus: read the quotes of the input files, drop blanks and duplicates."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.artifacts import Corpus, Source, sha256_of
from pipeline.config import DataConfig
from pipeline.errors import DataError, TryLater
from pipeline.inputs import Input, checksum
from pipeline.progress import bar
from pipeline.quotes import fold, read_quotes
from pipeline.storage.local import translated

log = logging.getLogger(__name__)


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


def summary(corpus: Corpus) -> str:
    def total(count: Callable[[Source], int]) -> int:
        return sum(count(source) for source in corpus.sources)

    return (
        f"{corpus.quotes} of {total(lambda s: s.found)} quotes kept from {len(corpus.sources)} files; dropped "
        f"{total(lambda s: s.exact_duplicates)} exact and {total(lambda s: s.near_duplicates)} near duplicates, "
        f"{total(lambda s: s.blank)} blank lines"
    )
