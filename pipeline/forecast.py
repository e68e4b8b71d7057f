"""What llama-quantize will make of a file, before it does: its types and its size, to the byte."""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pipeline import child, imatrix
from pipeline.errors import CheckFailed, ConfigError
from pipeline.export import convert
from pipeline.extend import with_context
from pipeline.gguf_file import GgufContents
from pipeline.llama_cpp import LlamaCpp
from pipeline.quant_types import QUANT_TYPES

log = logging.getLogger(__name__)

IMATRIX = "importance.gguf"
DATASET = "calibration.jsonl"
ALIGNMENT = 32  # GGUF's default: every tensor's data starts at a multiple of it
# "[   1/ 148] blk.0.ffn_up.weight - [ 768, 3072, 1, 1], type = f16, size = 4.50 MiB -> 0.74 MiB (q2_K)"
FORETOLD = re.compile(r"\[ *\d+/ *\d+\] (\S+) .*?type = *(\w+), size = [^\n]*?(?:\((\w+)\))?\n")
# "warning: NAME - ncols 576 not divisible by 256 (required for type q2_K) -> falling back to q4_0"
FELL_BACK = re.compile(
    r"warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\w+)\)[^\n]*to +(\w+)"
)


@dataclass(frozen=True)
class Fallback:
    """A matrix whose rows do not divide into the blocks of the type that was asked for."""

    tensor: str
    row: int
    block: int
    asked: str
    got: str


@dataclass(frozen=True)
class Choice:
    """What llama-quantize is told beside the file type. An importance matrix is at `IMATRIX` in its folder: its path
    goes into the file, which must not tell where a job ran."""

    importance: bool
    types: Mapping[str, str] = field(default_factory=dict)  # tensor to type, where not the file type's own

    def arguments(self) -> list[str | Path]:
        chosen = [f"^{re.escape(tensor)}$={kind}" for tensor, kind in self.types.items()]
        weighted: list[str | Path] = ["--imatrix", IMATRIX] if self.importance else []
        return weighted + [part for pair in chosen for part in ("--tensor-type", pair)]

    def header_bytes(self) -> int:
        """What the four keys that name an importance matrix take: length, name, type, and the value's own."""
        values = {"file": 8 + len(IMATRIX), "dataset": 8 + len(DATASET), "entries_count": 4, "chunks_count": 4}
        return sum(12 + len(f"quantize.imatrix.{key}") + size for key, size in values.items() if self.importance)


@dataclass(frozen=True)
class Forecast:
    size_bytes: int
    types: dict[str, str]  # tensor to type, as GGUF names it
    fallbacks: tuple[Fallback, ...]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by tensor, in GGUF's order: row length first


def foretell(contents: GgufContents, kind: str, tools: LlamaCpp, choice: Choice) -> Forecast:
    """What llama-quantize will make of a file, from its dry run; exact to the byte.

    The header keeps its size, the same keys and the same tensors by name and shape, but for what llama-quantize
    notes of an importance matrix. The dry run gets one too, of ones: with it, some tensors get another type.
    """
    now = {name: tensor.tensor_type.name for name, tensor in contents.tensors.items()}
    shapes = {name: tuple(tensor.shape.tolist()) for name, tensor in contents.tensors.items()}
    if kind == "F16":
        return Forecast(contents.path.stat().st_size, now, (), shapes)
    with tempfile.TemporaryDirectory() as folder:
        if choice.importance:
            ones = {name: np.ones(int(tensor.shape[0])) for name, tensor in contents.matrices.items()}
            imatrix.write(Path(folder, IMATRIX), ones, dict.fromkeys(ones, 1), chunk_size=1, dataset=DATASET)
        arguments = [*choice.arguments(), contents.path.resolve(), kind]
        said = child.run([tools.program("llama-quantize"), "--dry-run", *arguments], cwd=Path(folder)).stderr
    types = {tensor: (new or old).upper() for tensor, old, new in FORETOLD.findall(said)}
    if types.keys() != contents.tensors.keys():
        raise CheckFailed(
            f"llama-quantize's dry run speaks of {len(types)} tensors, but {contents.path.name} has {len(now)}; "
            "run scripts/build_llama_cpp.sh to get the version that this job knows"
        )
    size = sum(stored_bytes(shape, types[name]) for name, shape in shapes.items())
    fallbacks = tuple(
        Fallback(tensor, int(row), int(block), asked.upper(), got.upper())
        for tensor, row, block, asked, got in FELL_BACK.findall(said)
    )
    return Forecast(aligned(contents.header_bytes + choice.header_bytes()) + size, types, fallbacks, shapes)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def stored_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of one tensor with its padding. `shape` in GGUF's order: the row length first."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    size = math.prod(shape) // int(block) * int(block_bytes)
    return aligned(size)


def handle_fallbacks(kind: str, fallbacks: Sequence[Fallback], what: str) -> None:
    if not fallbacks:
        return
    first = fallbacks[0]
    found = (
        f"{len(fallbacks)} matrices cannot be stored as {kind} wants: {first.tensor} would get {first.got} instead "
        f"of {first.asked}, because its rows of {first.row} weights are not a multiple of {first.block}"
    )
    if what == "error":
        raise ConfigError(f"{found}; choose Q8_0, whose blocks are 32 weights, or quantize.fallback warn")
    log.warning("quantize: %s", found)


def require_foretold(contents: GgufContents, kind: str, forecast: Forecast) -> None:
    """Size, every tensor's type, and the type the file itself claims."""
    found: dict[str, object] = {name: tensor.tensor_type.name for name, tensor in contents.tensors.items()}
    found |= {"size in bytes": contents.path.stat().st_size, "file type": contents.metadata["general.file_type"]}
    needed: dict[str, object] = dict(forecast.types)
    needed |= {"size in bytes": forecast.size_bytes, "file type": QUANT_TYPES[kind].file_type}
    for what in sorted(found.keys() | needed.keys()):
        if found.get(what) != needed.get(what):
            raise CheckFailed(
                f"{contents.path.name} is not what llama-quantize foretold: {what} is {found.get(what)}, foretold was "
                f"{needed.get(what)}; run scripts/build_llama_cpp.sh and the job again"
            )


def forecasts_of(
    checkpoint: Path, kinds: Sequence[str], tools: LlamaCpp, *, name: str, importance: bool, context: int = 0
) -> dict[str, Forecast]:
    """Size and types of the file of each kind: the same whatever the weights, so the base model tells them.

    `context` is export.context.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as model:
        path = Path(folder) / "f16.gguf"
        convert(with_context(checkpoint, context, Path(model)), tools, name, path, f16_positions=bool(context))
        contents = GgufContents(path)
        return {kind: foretell(contents, kind, tools, Choice(importance)) for kind in kinds}
