"""Tuned model to sparse model: zero a share of every block matrix, and measure that it is that share."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from pipeline import sparsity
from pipeline.activations import HEAD, Gram, walk
from pipeline.artifacts import Calibration, Checkpoint, Facts
from pipeline.calibrate import load_calibration
from pipeline.config import SparsityConfig
from pipeline.errors import CheckFailed, ConfigError
from pipeline.loading import load_fp32
from pipeline.masks import Target, global_masks
from pipeline.matrices import block_matrices, weight_of
from pipeline.refit import refit, reselect

log = logging.getLogger(__name__)

GPT2_MATRICES_PER_BLOCK = 4  # c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj; 48 in the 12 blocks of the 124M model


def sparsify(
    dense: Checkpoint, calibration: Calibration, cfg: SparsityConfig, *, device: str, seed: int, out: Path
) -> Checkpoint:
    """Zero `cfg.ratio` of every block matrix of `dense`, measured on `calibration`; write the model to `out`.

    Embeddings, the head, biases and norms stay as they are. Raises `ConfigError` for a method or pattern that
    does not fit or a method without its text, `CheckFailed` when a matrix holds a NaN or the measured share is not the
    one asked for.
    """
    check_method(cfg)
    model = load_fp32(dense, device)
    modules = block_matrices(model)
    if model.config.model_type == "gpt2" and len(modules) != GPT2_MATRICES_PER_BLOCK * model.config.n_layer:
        raise CheckFailed(
            f"found {len(modules)} block matrices in a GPT-2 of {model.config.n_layer} layers, needed 4 a layer"
        )
    weights = {name: weight_of(module) for name, module in modules.items()}
    check_pattern({name: weight.shape[1] for name, weight in weights.items()}, cfg)
    require_finite(model)
    untouched = zeros_before(weights)
    sequences = load_calibration(calibration, "train")
    require_text(sequences, cfg)
    prune_model(model, sequences, cfg, seed)
    facts = measure(weights, cfg) | {"zeros_before": untouched, "calibration_tokens": sum(map(len, sequences))}
    model.cpu().save_pretrained(out)
    dense.copy_tokenizer(out)
    return Checkpoint.of(out, facts)


def check_method(cfg: SparsityConfig) -> None:
    """Raises `ConfigError` for a method that is not there, or that cannot do what is asked of it."""
    if cfg.method not in sparsity.methods():
        raise ConfigError(f"sparsity.method {cfg.method!r} is unknown; choose one of {', '.join(sparsity.methods())}")
    if cfg.scope == "global" and not hasattr(sparsity.load(cfg.method), "scores"):
        raise ConfigError(
            f"sparsity.scope global needs a method whose scores compare between matrices, and {cfg.method} fits each "
            "matrix by itself; choose magnitude, or sparsity.scope matrix"
        )


def check_pattern(widths: dict[str, int], cfg: SparsityConfig) -> None:
    """Raises `ConfigError` when the rows of a matrix (name to width) do not divide into the pattern's groups."""
    if cfg.pattern == "unstructured":
        return
    for name, width in widths.items():
        if width % cfg.kept[1]:
            raise ConfigError(
                f"sparsity.pattern {cfg.pattern} needs rows that are multiples of {cfg.kept[1]}, but those of {name} "
                f"are {width} wide; choose groups that divide them, for example 2:4"
            )


def require_text(sequences: Sequence[Sequence[int]], cfg: SparsityConfig) -> None:
    """Raises `ConfigError` when there is nothing for the method to measure the model on."""
    if not sequences and cfg.method not in sparsity.NEED_NO_TEXT:
        raise ConfigError(
            f"sparsity.method {cfg.method} measures the model on calibration text, and there is none; raise "
            f"calibration.generated, name a calibration.text, or choose {' or '.join(sparsity.NEED_NO_TEXT)}"
        )


def require_finite(model: PreTrainedModel) -> None:
    """Norms, biases and embeddings too: what they break would reach every matrix after them."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise CheckFailed(f"{name} holds values that are not finite; the tuned model is broken, train it again")


def prune_model(model: PreTrainedModel, sequences: Sequence[Sequence[int]], cfg: SparsityConfig, seed: int) -> None:
    """Prunes the block matrices of `model` in place, each block on the activations of the pruned ones before it."""
    if cfg.ratio == 0:
        return
    target = Target(cfg.exact_ratio, *(cfg.kept if cfg.pattern != "unstructured" else ()))
    method = sparsity.load(cfg.method)
    if cfg.scope == "global":
        weights = {name: weight_of(module) for name, module in block_matrices(model).items()}
        scores = {name: method.scores(weight, generator_of(name, seed)) for name, weight in weights.items()}
        for name, mask in global_masks(scores, cfg.ratio).items():
            weights[name].mul_(mask)
        return
    for name, module, gram in matrices_with_grams(model, sequences, cfg):
        weight = weight_of(module)
        dense = weight.float()
        pruned = method.prune(dense, gram, target, generator_of(name, seed))
        if gram and cfg.refit:  # an n:m pattern fixes which weights can stay
            pruned = (refit if target.group else reselect)(pruned, dense, gram)
        weight.copy_(pruned)


def matrices_with_grams(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], cfg: SparsityConfig
) -> Iterator[tuple[str, nn.Module, Gram | None]]:
    if cfg.method in sparsity.NEED_NO_TEXT:
        yield from ((name, module, None) for name, module in block_matrices(model).items())
        return
    for block in walk(model, sequences, f"sparsify {cfg.method}"):
        yield from ((name, module, gram) for name, (module, gram) in block.items() if name != HEAD)


def generator_of(name: str, seed: int) -> Generator:
    """Seeded by name, so that a matrix gets the same mask whatever comes before it."""
    return Generator().manual_seed(seed ^ zlib.crc32(name.encode()))


def zeros_before(weights: dict[str, Tensor]) -> int:
    return sum(int((weight == 0).sum()) for weight in weights.values())


def measure(weights: dict[str, Tensor], cfg: SparsityConfig) -> Facts:
    """Share of zeros of each matrix and of all, checked against the ratio asked for.

    A weight that was zero before can stay on top of those dropped, so only too few zeros is an error.
    """
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    shares = {name: zeros[name] / weight.numel() for name, weight in weights.items()}
    numel = sum(weight.numel() for weight in weights.values())
    total = sum(zeros.values()) / numel
    short = [name for name, weight in weights.items() if zeros[name] < round(cfg.exact_ratio * weight.numel())]
    # the total is of no use in scope matrix, where the count of each matrix was rounded by itself
    too_few = bool(short) if cfg.scope == "matrix" else sum(zeros.values()) < round(cfg.exact_ratio * numel)
    if too_few:
        raise CheckFailed(
            f"pruned {total:.4f} of the block weights, {cfg.exact_ratio:g} was asked for; short in {short[:3]}"
        )
    log.info("sparsify: share of zeros %.4f in %d matrices by %s", total, len(weights), cfg.method)
    return {"method": cfg.method, "matrices": len(weights), "zeros": total, "zeros_per_matrix": shares}
