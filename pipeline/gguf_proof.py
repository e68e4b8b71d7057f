"""Proofs that a GGUF file is the same model as a checkpoint. Each returns what it checked, or raises `CheckFailed`
naming the first thing that differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.gguf_reader import ReaderTensor
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline import llama_cpp
from pipeline.artifacts import Corpus, Facts, TokenDataset
from pipeline.errors import CheckFailed
from pipeline.gguf_file import GgufContents
from pipeline.gguf_names import as_stored, gguf_name, name_map
from pipeline.llama_cpp import LlamaCpp
from pipeline.progress import bar
from pipeline.scoring import torch_logits
from pipeline.tokens import load_split

PROOF_QUOTES = 20  # for the logits; every tensor is compared anyway
BATCH = 1000  # quotes tokenized at once
MADE_BY_THE_CONVERTER = {"rope_freqs.weight"}  # Llama 3's scaled rotary frequencies, computed from the config
DTYPES = {"F16": torch.float16, "F32": torch.float32}


def prove_metadata(contents: GgufContents, checkpoint: Path, begin_id: int, end_id: int) -> Facts:
    """What llama.cpp takes from the file's header, against the checkpoint's config and the ids of training."""
    config = AutoConfig.from_pretrained(checkpoint)
    needed = {
        "general.architecture": config.model_type,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "tokenizer.ggml.bos_token_id": begin_id,
        "tokenizer.ggml.eos_token_id": end_id,
        "tokenizer.ggml.add_bos_token": True,
    }
    found = {key: contents.metadata.get(key) for key in needed}
    for key, value in needed.items():
        if found[key] != value:
            raise differs(contents.path, f"{key} is {found[key]}, the checkpoint's is {value}")
    pre = contents.metadata.get("tokenizer.ggml.pre")
    if pre in (None, "default"):
        raise differs(contents.path, f"tokenizer.ggml.pre is {pre}, so llama.cpp would guess how to split words")
    return found | {"tokenizer.ggml.pre": pre}


def prove_tensors(contents: GgufContents, checkpoint: Path) -> int:
    """Every tensor, bit by bit, after the same rounding. Returns how many."""
    config = AutoConfig.from_pretrained(checkpoint)
    names = name_map(config)
    unseen = contents.tensors.keys() - MADE_BY_THE_CONVERTER
    equal = len(unseen)
    for hf_name, tensor in weights(checkpoint):
        name = gguf_name(names, hf_name)
        if name not in unseen:
            raise differs(contents.path, f"the checkpoint's {hf_name} ({name}) is not in it, or is there twice")
        unseen -= {name}
        if difference := compare(contents.tensors[name], as_stored(hf_name, tensor, config)):
            raise differs(contents.path, f"{name} {difference}")
    if unseen:
        raise differs(contents.path, f"it has {min(unseen)}, which the checkpoint has not")
    return equal


def weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                yield name, file.get_tensor(name)


def compare(stored: ReaderTensor, tensor: Tensor) -> str:
    """How they differ; empty when they do not."""
    kind = stored.tensor_type.name
    if kind not in DTYPES:
        return f"is stored as {kind}, needed is F16 or F32"
    if not torch.isfinite(tensor).all():
        return "is not finite in the checkpoint; the training went wrong"
    needed = tensor.to(DTYPES[kind]).contiguous().numpy()
    if not np.isfinite(needed).all():
        return f"has weights up to {tensor.abs().max():.3g}, more than F16 can hold"
    if stored.data.shape != needed.shape:
        return f"has shape {stored.data.shape}, the checkpoint's {needed.shape}"
    unequal = int(np.count_nonzero(stored.data.view(np.uint8) != needed.view(np.uint8)))
    return f"differs from the checkpoint's in {unequal} of {needed.nbytes} bytes" if unequal else ""


def prove_tokens(path: Path, corpus: Corpus, checkpoint: Path, tools: LlamaCpp) -> int:
    """llama.cpp splits every quote of the corpus into the ids it was trained on. Returns how many quotes."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    count = 0
    with corpus.path.open(encoding="utf-8") as file:
        while lines := list(islice(file, BATCH)):
            texts = [json.loads(line)["text"] for line in lines]
            # markup in a quote (<|endoftext|>) is text here and there
            needed = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            found = llama_cpp.tokenize(tools, path, texts)
            for text, ours, theirs in bar(zip(texts, needed, found, strict=True), "export: token ids", len(texts)):
                if ours != theirs:
                    raise differs(
                        path, f"llama.cpp tokenizes {text[:60]!r} as {theirs[:12]}…, trained was {ours[:12]}…"
                    )
            count += len(texts)
    return count


def prove_logits(
    contents: GgufContents, checkpoint: Path, tokens: TokenDataset, tolerance: float, tools: LlamaCpp
) -> Facts:
    """llama.cpp predicts what torch predicts from the same rounded weights.

    `rms` is the root-mean-square difference of their log-probabilities, as a share of torch's standard deviation.
    What is left is llama.cpp's rounding of activations to F16 before each matrix.
    """
    sequences = load_split(tokens, "holdout")[:PROOF_QUOTES]["input_ids"]
    model = rounded_model(contents, checkpoint)
    theirs = (torch.from_numpy(table) for table in llama_cpp.logits(tools, contents.path, sequences))
    pairs = zip(torch_logits(model, sequences), theirs, strict=True)
    measured = measure([(a.log_softmax(-1), b.log_softmax(-1)) for a, b in pairs])
    if not measured["rms"] <= tolerance:  # so that NaN fails
        raise differs(
            contents.path,
            f"llama.cpp's log-probabilities differ from torch's by {measured['rms']:.4g} of their standard deviation "
            f"over {len(sequences)} quotes, allowed is export.logits_tolerance {tolerance:g}",
        )
    return measured | {"quotes": len(sequences), "tolerance": tolerance}


def measure(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    torch_side = torch.cat([a.flatten() for a, _ in pairs])
    difference = torch.cat([(a - b).flatten() for a, b in pairs])
    return {
        "rms": float(difference.square().mean().sqrt() / torch_side.std()),
        "max_abs_nats": float(difference.abs().max()),
    }


def rounded_model(contents: GgufContents, checkpoint: Path) -> PreTrainedModel:
    """The checkpoint in float32, each weight rounded as the file rounds it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    stored, names = contents.tensors, name_map(model.config)
    with torch.no_grad():
        for hf_name, parameter in model.named_parameters():
            parameter.copy_(parameter.to(DTYPES[stored[str(gguf_name(names, hf_name))].tensor_type.name]))
    return model


def differs(path: Path, what: str) -> CheckFailed:
    return CheckFailed(f"{path.name} is not the checkpoint: {what}")
