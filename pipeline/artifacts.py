"""What stages hand to each other: small frozen records that point at files, each with the hash of what it
points at. `Facts` are the measurements a stage took; they go into metrics.json as they are."""

from __future__ import annotations

import hashlib
import shutil
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
    """`path` holds one Arrow stream a split, read with `tokens.load_split`; every quote is `begin_id … end_id`."""

    path: Path
    sha256: str
    begin_id: int
    end_id: int
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """`path` is JSON lines of {"split", "kind", "ids"}, read with `calibrate.load_calibration`."""

    path: Path
    sha256: str
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """`path` is a Hugging Face model folder: config, safetensors, tokenizer. `sha256` covers its weights."""

    path: Path
    sha256: str
    facts: Facts = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, facts: Facts) -> Checkpoint:
        """The checkpoint that was just written to `path`, hashed."""
        hashed = [path / "config.json", path / "tokenizer.json", *path.glob("*.safetensors")]
        return cls(path, sha256_of_files(hashed), facts)

    def files(self) -> list[Path]:
        """What others need to load it; not what else lies in the folder."""
        names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
        return [path for name in names if (path := self.path / name).is_file()] + sorted(
            self.path.glob("*.safetensors*")
        )

    def copy_tokenizer(self, out: Path) -> None:
        """File by file: saving a loaded tokenizer again drops add_bos_token, which llama.cpp's converter reads."""
        for path in (self.path / "tokenizer.json", self.path / "tokenizer_config.json"):
            shutil.copyfile(path, out / path.name)


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


@dataclass(frozen=True)
class Evaluation:
    """`facts` are the ledger, speeds and generations; `path` is the same as JSON."""

    path: Path
    sha256: str
    facts: Facts


@dataclass(frozen=True)
class ReleasedFile:
    name: str  # for people; the object is called by its hash
    sha256: str
    crc32c: str
    size_bytes: int


@dataclass(frozen=True)
class Release:
    """A published run, as its manifest tells it."""

    output: str  # URI of the output folder; the run lies under it at runs/<run_id>
    run_id: str
    name: str
    created: str  # UTC, ISO 8601
    result_digest: str  # over the GGUF files alone: the other files hold timings
    manifest_sha256: str
    files: tuple[ReleasedFile, ...]

    @property
    def uri(self) -> str:
        return f"{self.output.rstrip('/')}/runs/{self.run_id}"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
    """One hash for several files, of their names and contents, whatever order they are given in."""
    lines = sorted(f"{path.name} {sha256_of(path)}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
