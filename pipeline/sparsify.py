"""Tuned model to sparse model: zero a share of every block matrix, and measure that it is that share."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import torch
from torch import Generator, Tensor
from transformers import AutoModelForCausalLM

from pipeline import sparsity
from pipeline.artifacts import Checkpoint, Facts
from pipeline.config import SparsityConfig
from pipeline.errors import CheckFailed, ConfigError
from pipeline.masks import global_masks, keep_mask, n_of_m_mask
from pipeline.matrices import block_matrices, weight_of

log = logging.getLogger(__name__)

GPT2_MATRICES_PER_BLOCK = 4  # c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj; 48 in the 12 blocks of the 124M model


def sparsify(dense: Checkpoint, cfg: SparsityConfig, *, seed: int, out: Path) -> Checkpoint:
    """Zero `cfg.ratio` of every block matrix of `dense`; write the model to `out`.

    Embeddings, the head, biases and norms stay as they are. Raises `ConfigError` for a method or pattern that
    does not fit, `CheckFailed` when a matrix holds a NaN or the measured share is not the one asked for.
    """
    check_method(cfg.method)
    model = AutoModelForCausalLM.from_pretrained(dense.path, dtype=torch.float32)
    modules = block_matrices(model)
    if model.config.model_type == "gpt2" and len(modules) != GPT2_MATRICES_PER_BLOCK * model.config.n_layer:
        raise CheckFailed(
            f"found {len(modules)} block matrices in a GPT-2 of {model.config.n_layer} layers, needed 4 a layer"
        )
    weights = {name: weight_of(module) for name, module in modules.items()}
    untouched = zeros_before(weights)
    for name, mask in choose_masks(weights, cfg, seed).items():
        weights[name].mul_(mask)
    facts = measure(weights, cfg) | {"zeros_before": untouched}
    model.save_pretrained(out)
    dense.copy_tokenizer(out)
    return Checkpoint.of(out, facts)


def check_method(method: str) -> None:
    if method not in sparsity.methods():
        raise ConfigError(f"sparsity.method {method!r} is unknown; choose one of {', '.join(sparsity.methods())}")


def check_pattern(widths: dict[str, int], cfg: SparsityConfig) -> None:
    """Raises `ConfigError` when the rows of a matrix (name to width) do not divide into the pattern's groups."""
    if cfg.pattern == "unstructured":
        return
    for name, width in widths.items():
        if width % cfg.kept[1]:
            raise ConfigError(
                f"sparsity.pattern {cfg.pattern} needs rows that are multiples of {cfg.kept[1]}, but those of {name} "
                f"are {width} wide"
            )


def choose_masks(weights: dict[str, Tensor], cfg: SparsityConfig, seed: int) -> dict[str, Tensor]:
    """Matrix name to a boolean mask (out, in), True where the weight stays."""
    check_pattern({name: weight.shape[1] for name, weight in weights.items()}, cfg)
    method = sparsity.load(cfg.method)
    scores = {}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise CheckFailed(f"{name} holds values that are not finite; the tuned model is broken, nothing was pruned")
        # Seeded by name, so that a matrix gets the same mask whatever comes before it.
        generator = Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        scores[name] = method(weight.float(), generator)
    if cfg.scope == "global":
        return global_masks(scores, cfg.ratio)
    if cfg.pattern == "unstructured":
        return {name: keep_mask(score, cfg.ratio) for name, score in scores.items()}
    n, m = cfg.kept
    return {name: n_of_m_mask(score, n, m) for name, score in scores.items()}


def zeros_before(weights: dict[str, Tensor]) -> int:
    return sum(int((weight == 0).sum()) for weight in weights.values())


def measure(weights: dict[str, Tensor], cfg: SparsityConfig) -> Facts:
    """Share of zeros of each matrix and of all, checked against the ratio asked for.

    A weight that was zero before can stay on top of those dropped, so only too few zeros is an error.
    """
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    shares = {name: zeros[name] / weight.numel() for name, weight in weights.items()}
    total = sum(zeros.values()) / sum(weight.numel() for weight in weights.values())
    short = [name for name, weight in weights.items() if zeros[name] < round(cfg.exact_ratio * weight.numel())]
    if total + 1e-6 < cfg.exact_ratio or (cfg.scope == "matrix" and short):
        raise CheckFailed(
            f"pruned {total:.4f} of the block weights, {cfg.exact_ratio:g} was asked for; short in {short[:3]}"
        )
    log.info("sparsify: share of zeros %.4f in %d matrices by %s", total, len(weights), cfg.method)
    return {"method": cfg.method, "matrices": len(weights), "zeros": total, "zeros_per_matrix": shares}
