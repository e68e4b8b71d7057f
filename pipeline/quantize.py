"""F16 to quantized GGUF files: llama-quantize with an importance matrix, then our encoder over what it knows better.

The stock file decides types, sizes and everything but the bytes of the tensors that our encoder rounds again, so
the result is never larger than llama-quantize's, and is foretold by its dry run.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from pipeline import imatrix, llama_cpp
from pipeline.activations import HEAD, input_squares
from pipeline.artifacts import Calibration, Checkpoint, Facts, GgufFile, GgufSet, sha256_of
from pipeline.budget import choose_types, least
from pipeline.calibrate import load_calibration
from pipeline.config import QuantizeConfig
from pipeline.config.shrinking import UNQUANTIZED
from pipeline.encode import encode_model, take_unpruned, to_adapt
from pipeline.errors import MachineError
from pipeline.forecast import DATASET, IMATRIX, Choice, Forecast, foretell, handle_fallbacks, require_foretold
from pipeline.gguf_file import GgufContents
from pipeline.gguf_names import matrix_names
from pipeline.gguf_weights import head_tensor, matrix_types, read_matrices, write_kquants
from pipeline.kept_zeros import cost_of_zeros, pruned_weights, require_types_with_zeros, require_zeros
from pipeline.kquants import KTYPES
from pipeline.llama_cpp import LlamaCpp
from pipeline.loading import load_fp32
from pipeline.matrices import block_matrices
from pipeline.quant_types import check_types

log = logging.getLogger(__name__)


def quantize(
    f16: GgufFile,
    model: Checkpoint,
    tuned: Checkpoint,
    calibration: Calibration,
    cfg: QuantizeConfig,
    *,
    keep_zeros: bool,
    tools: LlamaCpp,
    device: str,
    name: str,
    out: Path,
    adapting: bool = False,
) -> GgufSet:
    """One file NAME-TYPE.gguf for each type of `cfg`; F16 is the exported file itself.

    `model` is the checkpoint behind `f16`, measured on `calibration`; `tuned` is that before pruning. `adapting`:
    what `adapt` will round, after this, is left as llama-quantize has it. `keep_zeros`: zeros of the block matrices of
    `model` are zeros in the file. Raises `ConfigError` for an unknown type, one that loses zeros that are to be kept, a
    fallback where `cfg.fallback` is error, or a budget that is too small; `CheckFailed` when a file is not what was
    foretold, `MachineError` when the disk is too small. All before the first is written, if it can be.
    """
    check_types(cfg.types, cfg.importance)
    choice = Choice(cfg.importance)
    forecasts = foretell_all(f16, cfg, choice, keep_zeros, tools, name)
    require_disk(sum(forecast.size_bytes for forecast in forecasts.values()), out)
    if choice.importance:
        write_importance(load_fp32(model, device), load_calibration(calibration, "train"), out / IMATRIX)
    encoder = Encoder(model, tuned, calibration, cfg.encoder, keep_zeros, device)
    limited = [kind for kind in cfg.types if cfg.max_bytes and kind not in UNQUANTIZED]
    budget: Facts = {}
    if limited:
        choice, budget = encoder.types_within(cfg.max_bytes, f16, choice, tools, out)
        forecasts = {kind: foretell(GgufContents(f16.path), kind, tools, choice) for kind in cfg.types}
        require_disk(sum(forecast.size_bytes for forecast in forecasts.values()), out)
    files = []
    for kind, forecast in forecasts.items():
        path = out / f"{name}-{kind}.gguf"
        stock(f16, kind, choice, tools, path)
        ours = encoder.encode(path, kind, adapting) | {"importance": cfg.importance}
        if kind in limited:
            ours |= {"budget": budget}
        if ours.get("keep_zeros"):
            ours |= {"zeros_cost": encoder.cost_of_zeros(path, kind)}
        if keep_zeros:
            encoder.require_zeros(path)
        files.append(described(path, kind, forecast, ours))
    return GgufSet(tuple(files))


def foretell_all(
    f16: GgufFile, cfg: QuantizeConfig, choice: Choice, keep_zeros: bool, tools: LlamaCpp, name: str
) -> dict[str, Forecast]:
    """By type, after the checks that need no more than this."""
    contents, found = GgufContents(f16.path), {}
    for kind in cfg.types:
        found[kind] = least(foretell(contents, kind, tools, choice), f"{name}-{kind}.gguf", cfg.max_bytes)
    for kind, forecast in found.items():
        handle_fallbacks(kind, forecast.fallbacks, cfg.fallback)
        if keep_zeros:
            require_types_with_zeros(kind, forecast)
    return found


@dataclass(frozen=True)
class Encoder:
    """What rounds tensors of a stock file again, from the weights of `model` and `tuned`."""

    model: Checkpoint
    tuned: Checkpoint
    calibration: Calibration
    name: str
    keep_zeros: bool
    device: str

    def encode(self, path: Path, kind: str, adapting: bool = False) -> Facts:
        if self.name == "gptq" and kind != "F16":
            sequences = load_calibration(self.calibration, "train")
            model, load_tuned = load_fp32(self.model, self.device), partial(load_fp32, self.tuned, "cpu")
            return encode_file(model, load_tuned, sequences, path, self.keep_zeros, adapting)
        return {"encoder": "llama.cpp", "encoded_tensors": 0, "unpruned_tensors": 0}

    def types_within(
        self, max_bytes: int, f16: GgufFile, choice: Choice, tools: LlamaCpp, out: Path
    ) -> tuple[Choice, Facts]:
        return choose_types(
            f16, *self.pair(), self.validation(), max_bytes, choice, self.encode,
            keep_zeros=self.keep_zeros, tools=tools, out=out,
        )  # fmt: skip

    def cost_of_zeros(self, path: Path, kind: str) -> Facts:
        free = partial(replace(self, keep_zeros=False).encode, kind=kind)
        return cost_of_zeros(*self.pair(), path, self.validation(), free)

    def require_zeros(self, path: Path) -> None:
        pruned = load_fp32(self.model, "cpu")
        require_zeros(pruned, path, pruned_weights(pruned))

    def pair(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        return load_fp32(self.model, self.device), load_fp32(self.tuned, self.device)

    def validation(self) -> list[list[int]]:
        return load_calibration(self.calibration, "validation")


def write_importance(model: PreTrainedModel, sequences: list[list[int]], path: Path) -> None:
    """The mean squared inputs of every matrix, the head's under the name of the embedding it is tied to."""
    found = input_squares(model, sequences)
    names = matrix_names(model.config, block_matrices(model)) | {HEAD: head_tensor(model)}
    imatrix.write(
        path,
        {names[name]: squares.sums.cpu().numpy() for name, squares in found.items()},
        {names[name]: squares.tokens for name, squares in found.items()},
        chunk_size=max(map(len, sequences)),
        dataset=DATASET,
    )


def stock(f16: GgufFile, kind: str, choice: Choice, tools: LlamaCpp, path: Path) -> None:
    """What llama-quantize makes of `f16`; for F16 the file itself."""
    if kind == "F16":
        try:
            os.link(f16.path, path)
        except OSError:  # bucket mounts and some disks have no hard links
            shutil.copyfile(f16.path, path)
        return
    llama_cpp.quantize(tools, f16.path, path, kind, choice.arguments())


def encode_file(
    model: PreTrainedModel,
    load_tuned: Callable[[], PreTrainedModel],
    sequences: list[list[int]],
    path: Path,
    keep_zeros: bool,
    adapting: bool = False,
) -> Facts:
    """The k-quant tensors of `path` that our encoder has a grid for, rounded by it, written over the stock ones.

    `adapting`: those that `adapt` rounds stay, and the others are fitted to them as they are before any rounding.
    """
    kinds = matrix_types(model, path)
    known = {name: kind for name, kind in kinds.items() if kind in KTYPES}
    unpruned = take_unpruned(model, load_tuned, known, keep_zeros)
    later = to_adapt(known) if adapting else {}
    ours = {name: kind for name, kind in known.items() if name not in later}
    if ours:
        others = read_matrices(model, path, [name for name in kinds if name not in known and name != HEAD])
        write_kquants(model, path, encode_model(model, sequences, ours, others=others, keep_zeros=keep_zeros))
    log.info(
        "quantize: %d tensors of %s encoded with error feedback, %d of them from the weights before pruning",
        len(ours),
        path.name,
        len(unpruned),
    )
    return {
        "encoder": "gptq",
        "encoded_tensors": len(ours),
        "unpruned_tensors": len(unpruned),
        "keep_zeros": keep_zeros,
    }


def described(path: Path, kind: str, forecast: Forecast, ours: Facts) -> GgufFile:
    contents = GgufContents(path)
    require_foretold(contents, kind, forecast)
    size = path.stat().st_size
    facts = contents.describe() | {
        "predicted_bytes": forecast.size_bytes,
        "fallbacks": [asdict(fallback) for fallback in forecast.fallbacks],
    }
    log.info("quantize: %s %.1f MB, %.2f bits a weight", path.name, size / 1e6, facts["bits_per_weight"])
    return GgufFile(path, sha256_of(path), size, kind, facts | ours)


def require_disk(needed: int, out: Path) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise MachineError(
            f"the quantized files need {needed / 1e6:.1f} MB, but the disk of {out} has {free / 1e6:.1f} MB left; "
            "free some space or set work_dir to a larger disk"
        )
