"""F16 to quantized GGUF files by llama-quantize: foretold by its dry run, then measured and held to that."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pipeline import child
from pipeline.artifacts import GgufFile, GgufSet, sha256_of
from pipeline.config import QuantizeConfig
from pipeline.errors import CheckFailed, ConfigError, MachineError
from pipeline.export import convert
from pipeline.gguf_file import GgufContents
from pipeline.llama_cpp import LlamaCpp, threads
from pipeline.quant_types import QUANT_TYPES, check_types

log = logging.getLogger(__name__)

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
class Forecast:
    size_bytes: int
    types: dict[str, str]  # tensor to type, as GGUF names it
    fallbacks: tuple[Fallback, ...]


def quantize(f16: GgufFile, cfg: QuantizeConfig, *, tools: LlamaCpp, name: str, out: Path) -> GgufSet:
    """One file NAME-TYPE.gguf for each type of `cfg`; F16 is the exported file itself.

    Raises `ConfigError` for an unknown type, or a fallback where `cfg.fallback` is error; `CheckFailed` when a file
    is not what was foretold, `MachineError` when the disk is too small. All before the first is written, if it can be.
    """
    check_types(cfg.types)
    contents = GgufContents(f16.path)
    forecasts = {kind: foretell(contents, kind, tools) for kind in cfg.types}
    for kind, forecast in forecasts.items():
        handle_fallbacks(kind, forecast.fallbacks, cfg.fallback)
    require_disk(sum(forecast.size_bytes for forecast in forecasts.values()), out)
    return GgufSet(tuple(make(f16, *item, tools, out / f"{name}-{item[0]}.gguf") for item in forecasts.items()))


def foretell(contents: GgufContents, kind: str, tools: LlamaCpp) -> Forecast:
    """What llama-quantize will make of a file, from its dry run; exact to the byte.

    The header does not change in size: the same keys, and the same tensors by name and shape.
    """
    now = {name: tensor.tensor_type.name for name, tensor in contents.tensors.items()}
    if kind == "F16":
        return Forecast(contents.path.stat().st_size, now, ())
    said = child.run([tools.program("llama-quantize"), "--dry-run", contents.path, kind]).stderr
    types = {tensor: (new or old).upper() for tensor, old, new in FORETOLD.findall(said)}
    if types.keys() != contents.tensors.keys():
        raise CheckFailed(
            f"llama-quantize's dry run speaks of {len(types)} tensors, but {contents.path.name} has {len(now)}; "
            "run scripts/build_llama_cpp.sh to get the version that this job knows"
        )
    size = sum(stored_bytes(tensor.shape.tolist(), types[name]) for name, tensor in contents.tensors.items())
    fallbacks = tuple(
        Fallback(tensor, int(row), int(block), asked.upper(), got.upper())
        for tensor, row, block, asked, got in FELL_BACK.findall(said)
    )
    return Forecast(contents.data_offset + size, types, fallbacks)


def stored_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of one tensor with its padding. `shape` in GGUF's order: the row length first."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    size = math.prod(shape) // int(block) * int(block_bytes)
    return -(-size // ALIGNMENT) * ALIGNMENT


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


def require_disk(needed: int, out: Path) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise MachineError(
            f"the quantized files need {needed / 1e6:.1f} MB, but the disk of {out} has {free / 1e6:.1f} MB left; "
            "free some space or set work_dir to a larger disk"
        )


def make(f16: GgufFile, kind: str, forecast: Forecast, tools: LlamaCpp, path: Path) -> GgufFile:
    if kind == "F16":
        try:
            os.link(f16.path, path)
        except OSError:  # bucket mounts and some disks have no hard links
            shutil.copyfile(f16.path, path)
    else:
        command: list[str | Path] = [tools.program("llama-quantize"), f16.path, path, kind, str(threads())]
        child.run(command, writes_in=path.parent)
    contents = GgufContents(path)
    require_foretold(contents, kind, forecast)
    size = path.stat().st_size
    facts = contents.describe() | {
        "predicted_bytes": forecast.size_bytes,
        "fallbacks": [asdict(fallback) for fallback in forecast.fallbacks],
    }
    log.info("quantize: %s %.1f MB, %.2f bits a weight", path.name, size / 1e6, facts["bits_per_weight"])
    return GgufFile(path, sha256_of(path), size, kind, facts)


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


def refuse_fallbacks(checkpoint: Path, cfg: QuantizeConfig, tools: LlamaCpp) -> None:
    """What `quantize` would refuse at the end, refused before training. Raises `ConfigError`."""
    for kind, forecast in forecasts_of(checkpoint, cfg.types, tools, name="base").items():
        handle_fallbacks(kind, forecast.fallbacks, cfg.fallback)


def forecasts_of(checkpoint: Path, kinds: Sequence[str], tools: LlamaCpp, *, name: str) -> dict[str, Forecast]:
    """Size and types of the file of each kind: the same whatever the weights, so the base model tells them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f16.gguf"
        convert(checkpoint, tools, name, path)
        contents = GgufContents(path)
        return {kind: foretell(contents, kind, tools) for kind in kinds}
