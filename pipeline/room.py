"""Disk and memory that a job needs, by the size of its base model: asked for before a minute is spent."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig

from pipeline.artifacts import Checkpoint
from pipeline.checkpoints import KEPT
from pipeline.config import JobConfig
from pipeline.errors import ConfigError, MachineError
from pipeline.memory import RUNTIME_BYTES, memory_available
from pipeline.storage import scheme_of
from pipeline.storage.local import local_path
from pipeline.work_cache import others

log = logging.getLogger(__name__)

LARGEST_QUANT = 8.5 / 32  # Q8_0 of fp32; smaller types need less


def check_room(base: Checkpoint, cfg: JobConfig, device: str) -> None:
    """Raises `MachineError` when disk or memory are certain to be too small, `ConfigError` for the GPU's memory.

    What stages left in the work folder counts as free: this job's are done, older ones' are removed when room is short.
    """
    results, needed = disk_needed(base, cfg), memory_needed(base, cfg)
    free = shutil.disk_usage(cfg.work_dir).free + sum(size_of(folder) for folder in others(cfg.work_dir, ()))
    if free < (total := sum(results.values()) + released_beside(base, cfg)):
        raise MachineError(
            f"the job needs {gb(total)} under work_dir {cfg.work_dir}, but its disk has {gb(free)} for it; free some "
            "space or set work_dir to a larger disk"
        )
    check_output(base, cfg)
    if free < total + (most := max(checkpoints_needed(base, cfg).values())):
        log.warning(
            "disk: %s under work_dir %s hold the results but not all checkpoints (%s more); a kill can cost more work",
            *(gb(free), cfg.work_dir, gb(most)),
        )
    if device == "cuda":
        check_gpu(needed - RUNTIME_BYTES, torch.cuda.get_device_properties(0).total_memory)
        needed = 2 * weight_bytes(base) + RUNTIME_BYTES
    available = memory_available()
    if available is not None and available < needed:
        raise MachineError(
            f"the job needs at least {gb(needed)} of memory for this base model, but {gb(available)} can be had; take "
            "a larger machine (or raise the container's limit), or a smaller model"
        )


def check_gpu(needed: int, total: int) -> None:
    if total < needed:
        raise ConfigError(
            f"the job needs at least {gb(needed)} of GPU memory for this base model, but the GPU has {gb(total)}; take "
            "a larger GPU, set device to cpu, or choose a smaller model"
        )


def disk_needed(base: Checkpoint, cfg: JobConfig, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Bytes of each stage's results. `sizes` are those of the GGUF files by type, where they have been foretold; else
    they count as Q8_0, for they are small beside the models."""
    model = sum(path.stat().st_size for path in base.files())
    sizes = sizes or {"F16": model // 2}
    files = sum(sizes.get(kind, int(LARGEST_QUANT * model)) for kind in cfg.quantize.types)
    return {
        "obtain": model,
        "finetune": model + (2 * model if cfg.train.select_best else 0),
        "sparsify": model,
        "recover": model,
        "extend": model if cfg.export.context else 0,
        "export": sizes["F16"],
        "quantize": files,
        "adapt": files,
        "finish": files,
    }


def checkpoints_needed(base: Checkpoint, cfg: JobConfig) -> dict[str, int]:
    """Bytes of each stage's checkpoints: those kept and one that is being written. They go when the stage is done."""
    if not (cfg.resume.minutes or cfg.resume.steps):
        return {"finetune": 0}
    weights, trained = weight_bytes(base), trained_bytes(base)
    adapters = weights // 10  # of LoRA, generously
    scales = trained // 10  # those of blocks of 256 weights, and vectors, generously
    a_training = 3 * (weights if cfg.train.method == "full" else adapters) + (weights if cfg.train.select_best else 0)
    a_distillation = 4 * trained  # now, at its best, and Adam's two
    return {
        "finetune": (KEPT + 1) * a_training,
        "recover": (KEPT + 1) * a_distillation if cfg.recover.steps else 0,
        "adapt": (KEPT + 1) * a_distillation if cfg.adapting else 0,
        "finish": (KEPT + 1) * 4 * scales if cfg.finish.steps else 0,
    }


def needs_of(base: Checkpoint, cfg: JobConfig) -> dict[str, int]:
    """Bytes that each stage wants free when it begins."""
    checkpoints = checkpoints_needed(base, cfg)
    return {stage: size + checkpoints.get(stage, 0) for stage, size in disk_needed(base, cfg).items()}


def released_beside(base: Checkpoint, cfg: JobConfig) -> int:
    """Bytes of the release where the output is a folder on the work folder's disk."""
    output = output_folder(cfg)
    return release_needed(base, cfg) if output and on_one_disk(output, cfg.work_dir) else 0


def check_output(base: Checkpoint, cfg: JobConfig) -> None:
    """Raises `MachineError` when an output folder on another disk than the work folder's cannot hold the release."""
    output = output_folder(cfg)
    if output is None or on_one_disk(output, cfg.work_dir):
        return
    needed, free = release_needed(base, cfg), shutil.disk_usage(output).free
    if free < needed:
        raise MachineError(
            f"the release needs {gb(needed)} under output {cfg.output}, but its disk has {gb(free)} for it; free some "
            "space or set output to a larger disk"
        )


def release_needed(base: Checkpoint, cfg: JobConfig) -> int:
    """Bytes of objects and plain copies."""
    return 2 * (disk_needed(base, cfg)["finish"] + (weight_bytes(base) if cfg.publish.safetensors else 0))


def output_folder(cfg: JobConfig) -> Path | None:
    """The folder that the output is, or will be made in; None for a bucket."""
    if scheme_of(cfg.output) not in ("", "file"):
        return None
    output = local_path(cfg.output).absolute()
    return next(path for path in (output, *output.parents) if path.exists())


def on_one_disk(*folders: Path) -> bool:
    return len({folder.stat().st_dev for folder in folders}) == 1


def memory_needed(base: Checkpoint, cfg: JobConfig) -> int:
    """Bytes that are certain to be in memory at once, in the hungriest stage; activations come on top.

    Measured for GPT-2 (498 MB): finetune peaks at 3.4 GB, of which this knows 2.5.
    """
    weights, trained = weight_bytes(base), trained_bytes(base)
    stages = [weights + 3 * (weights if cfg.train.method == "full" else 0)]  # gradients and Adam's two
    if cfg.recover.steps or cfg.adapting:
        stages.append(2 * weights + 4 * trained)  # student, teacher; gradients, Adam's two, the best so far
    if cfg.finish.steps and cfg.finish.train == "all":
        stages.append(2 * weights + trained)  # student, teacher; what the student's matrices decode to
    return max(stages) + RUNTIME_BYTES


def weight_bytes(base: Checkpoint) -> int:
    """In fp32, as `obtain` leaves it."""
    return sum(path.stat().st_size for path in base.files() if path.suffix == ".safetensors")


def trained_bytes(base: Checkpoint) -> int:
    """Of what recovery trains: all but token embedding and head."""
    config = AutoConfig.from_pretrained(base.path)
    table = 4 * config.vocab_size * config.hidden_size
    tables: int = table if config.tie_word_embeddings else 2 * table
    return max(0, weight_bytes(base) - tables)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
