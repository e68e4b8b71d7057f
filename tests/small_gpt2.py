"""The smallest GPT-2 that the whole job works on: one block, 256 wide for k-quants, a token for each byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.base_model import save_tokenizer
from pipeline.llama_cpp import CONVERTER, LlamaCpp

END = "<|endoftext|>"


def make_model(out: Path, width: int = 256) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token=END, eos_token=END, add_prefix_space=False
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_embd=width, n_head=4, n_positions=64,
        bos_token_id=len(tokenizer) - 1, eos_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    out.mkdir(parents=True)
    GPT2LMHeadModel(config).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    return out


def byte_tokenizer() -> Tokenizer:
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", END]  # llama.cpp wants a merge at least
    tokenizer = Tokenizer(BPE({word: number for number, word in enumerate(words)}, [("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_tools(tools: LlamaCpp, out: Path) -> Path:
    """`tools` with the small converter: the real one recognizes GPT-2's own vocabulary only."""
    (out / CONVERTER).parent.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("small_converter.py"), out / CONVERTER)
    shutil.copy(tools.root / "BUILD.json", out)
    (out / "bin").symlink_to(tools.root / "bin")
    return out
