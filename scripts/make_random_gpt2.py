#!/usr/bin/env python3
"""GPT-2's shape with random weights and GPT-2's own tokenizer, as a Hugging Face folder: for tests and benches
where no hub can be reached."""

from __future__ import annotations

from pathlib import Path

import click


def make(
    out: Path,
    vocab: Path,
    *,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    positions: int = 1024,
    seed: int = 0,
) -> Path:
    """`out`, filled. `vocab` is llama.cpp's ggml-vocab-gpt-2.gguf. k-quants need a width of 256, 512, 768, …"""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from pipeline.base_model import save_tokenizer
    from pipeline.gguf_model import tokenizer_from_gguf

    tokenizer = tokenizer_from_gguf(vocab)
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=layers, n_embd=width, n_head=heads, n_positions=positions)
    out.mkdir(parents=True, exist_ok=True)
    GPT2LMHeadModel(config).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    return out


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--vocab", type=click.Path(path_type=Path, exists=True), help="Default: of the built llama.cpp.")
@click.option("--layers", default=12)
@click.option("--width", default=768)
@click.option("--heads", default=12)
@click.option("--positions", default=1024)
@click.option("--seed", default=0)
def main(out: Path, vocab: Path | None, **shape: int) -> None:
    from pipeline import llama_cpp

    vocab = vocab or llama_cpp.find().root / "models" / "ggml-vocab-gpt-2.gguf"
    click.echo(make(out, vocab, **shape))


if __name__ == "__main__":
    main()
