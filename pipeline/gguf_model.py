"""A GGUF file read back into what transformers works with: weights in fp32, and the tokenizer.

transformers dequantizes the weights itself. The tokenizer is built here, because a wrong pre-tokenizer (SmolLM2
splits digits, GPT-2 does not) changes ids without a word; an unknown one is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.errors import ConfigError, DataError
from pipeline.gguf_guard import check_from_outside

ARCHITECTURE = "llama"

# tokenizer.ggml.pre to what the original tokenizer.json says; llama.cpp recognizes both by their output's hash.
PRE_TOKENIZERS: dict[str, list[PreTokenizer]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
}

SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def model_from_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The dequantized model in fp32 and its tokenizer.

    Raises `ConfigError` for an architecture other than Llama's, `DataError` for a file that is cut off or torn.
    """
    check_from_outside(path)
    reader = _open(path)
    architecture = _field(reader, "general.architecture", path)
    if architecture != ARCHITECTURE:
        raise ConfigError(
            f"{path.name} is a GGUF of architecture {architecture}, but only {ARCHITECTURE} can be fine-tuned from "
            "GGUF; set model.base to a hub id or a folder with safetensors"
        )
    tokenizer = _tokenizer(reader, path)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ValueError, KeyError, IndexError, RuntimeError) as e:
        raise DataError(f"the weights of {path} cannot be read ({e}); fetch the file again") from e
    return model, tokenizer


def tokenizer_from_gguf(path: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer stored in a GGUF file; ids as llama.cpp gives them.

    Raises `ConfigError` for another kind of tokenizer, `DataError` for a file that cannot be read.
    """
    return _tokenizer(_open(path), path)


def _tokenizer(reader: GGUFReader, path: Path) -> PreTrainedTokenizerFast:
    kind, pre, tokens, merges, types = (
        _field(reader, f"tokenizer.ggml.{key}", path) for key in ("model", "pre", "tokens", "merges", "token_type")
    )
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{path.name} has a {kind} tokenizer with the pre-tokenizer {pre}; known from GGUF are byte-level BPE "
            f"(gpt2) with one of: {', '.join(PRE_TOKENIZERS)}"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(_added(tokens, types))
    named = {
        name: tokens[reader.fields[key].contents()] for name, key in SPECIAL_TOKENS.items() if key in reader.fields
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def _added(tokens: list[str], types: list[int]) -> list[AddedToken]:
    """Tokens that are matched whole before any merging; they keep the ids they have."""
    kinds = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    return [
        AddedToken(token, special=kinds[TokenType(kind)], normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in kinds
    ]


def _open(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OSError) as e:  # numpy's own words for reading past the end of a file
        raise DataError(f"{path} is not a whole GGUF file ({e}); fetch it again") from e


def _field(reader: GGUFReader, key: str, path: Path) -> Any:
    if key not in reader.fields:
        raise DataError(f"{path} has no {key}; it is not a GGUF file of a language model")
    return reader.fields[key].contents()
