"""What stages hand to each other: small frozen records that point at files, each with the hash of what it
points at. `Facts` are the measurements a stage took; they go into metrics.json as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Facts = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One input file: where it came from and what became of its quotes."""

    name: str
    uri: str
    sha256: str
    size_bytes: int
    found: int  # quotes before dropping any, blanks excluded
    blank: int
    exact_duplicates: int
    near_duplicates: int  # equal after folding case and punctuation
    kept: int


@dataclass(frozen=True)
class Corpus:
    """`path` is JSON lines of {"text", "source", "key"}; `key` is the folded text that decides the split."""

    path: Path
    sha256: str
    sources: tuple[Source, ...]

    @property
    def quotes(self) -> int:
        return sum(source.kept for source in self.sources)


@dataclass(frozen=True)
class TokenDataset:
    """`path` holds one `datasets` folder a split (train, validation, holdout): input_ids, text, source, truncated."""

    path: Path
    sha256: str
    begin_id: int
    end_id: int
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """`path` is a Hugging Face model folder: config, safetensors, tokenizer. `sha256` covers its weights."""

    path: Path
    sha256: str
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class GgufFile:
    path: Path
    sha256: str
    size_bytes: int
    type: str  # the file type's name: F16, Q2_K, …
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class GgufSet:
    """The quantized files of one run, in the order asked for."""

    files: tuple[GgufFile, ...]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
    """One hash for several files, of their names and contents, whatever order they are given in."""
    lines = sorted(f"{path.name} {sha256_of(path)}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
