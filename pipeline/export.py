"""Checkpoint to F16 GGUF by llama.cpp's own converter, and the proof that it is the same model."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline import child
from pipeline.artifacts import Checkpoint, Corpus, Facts, GgufFile, TokenDataset, sha256_of
from pipeline.config import ExportConfig
from pipeline.errors import CheckFailed
from pipeline.extend import with_context
from pipeline.gguf_f16 import store_as_f16
from pipeline.gguf_file import GgufContents
from pipeline.gguf_proof import prove_logits, prove_metadata, prove_tensors, prove_tokens
from pipeline.gguf_reader import TensorReader
from pipeline.llama_cpp import CONVERTER, LlamaCpp

log = logging.getLogger(__name__)

POSITIONS = "position_embd.weight"
ADD_BOS = "tokenizer.ggml.add_bos_token"


def export(
    checkpoint: Checkpoint,
    corpus: Corpus,
    tokens: TokenDataset,
    cfg: ExportConfig,
    *,
    tools: LlamaCpp,
    name: str,
    out: Path,
) -> GgufFile:
    """`checkpoint` as NAME-F16.gguf, proved equal to it; with `cfg.context`, of that many positions, stored in F16.

    A checkpoint that `extend` has not given them gets them filled. Raises `ConfigError` where it cannot, `CheckFailed`
    naming what differs: a tensor, a quote's token ids, the logits, or a piece of metadata.
    """
    path = out / f"{name}-F16.gguf"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        source = with_context(checkpoint.path, cfg.context, Path(folder))
        convert(source, tools, name, path, f16_positions=bool(cfg.context))
        contents = GgufContents(path)
        metadata = prove_metadata(contents, source, tokens.begin_id, tokens.end_id)
        proof: Facts = {
            "tensors_equal": prove_tensors(contents, source),
            "quotes_tokenized": prove_tokens(path, corpus, source, tools),
            "logits": prove_logits(contents, source, tokens, cfg.logits_tolerance, tools),
        }
    log.info(
        "export: %d tensors equal, token ids of %d quotes equal, log-probabilities within %.4f of their deviation",
        proof["tensors_equal"],
        proof["quotes_tokenized"],
        proof["logits"]["rms"],
    )
    facts = contents.describe() | {"proof": proof, "metadata": metadata}
    return GgufFile(path, sha256_of(path), path.stat().st_size, "F16", facts)


def convert(checkpoint: Path, tools: LlamaCpp, name: str, path: Path, *, f16_positions: bool = False) -> None:
    """Writes `path`. Raises `CheckFailed` with the converter's last line."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        view = Path(folder)
        lay_out(checkpoint, view)
        command: list[str | Path] = [
            sys.executable,
            tools.root / CONVERTER,
            view,
            "--outtype",
            "f16",
            "--outfile",
            path,
        ]
        child.run([*command, "--model-name", name], writes_in=path.parent)
    set_add_bos(path)
    if f16_positions:
        store_as_f16(path, POSITIONS)


def lay_out(checkpoint: Path, view: Path) -> None:
    """The checkpoint as the converter wants it: its files linked, two of them with what llama.cpp needs added."""
    for file in checkpoint.iterdir():
        if file.is_file():
            (view / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    if "n_positions" in config:  # transformers no longer writes GPT-2's n_ctx; the converter reads only that
        rewrite(view / "config.json", config | {"n_ctx": config["n_positions"]})
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
    # training starts every quote with the begin token, the end token where a tokenizer has no other
    begin = tokenizer.get("bos_token") or tokenizer["eos_token"]
    rewrite(view / "tokenizer_config.json", tokenizer | {"bos_token": begin, "add_bos_token": True})


def rewrite(path: Path, content: dict[str, Any]) -> None:
    path.unlink()  # the link, not what it points at
    path.write_text(json.dumps(content))


def set_add_bos(path: Path) -> None:
    """llama.cpp starts a text with the begin token, as in training.

    The converter turns that off for every Llama with 49,152 tokens, taking it for a Granite code model.
    """
    field = TensorReader(path, "r+").fields.get(ADD_BOS)
    if field is None:
        raise CheckFailed(f"{path.name} has no {ADD_BOS}, which the converter writes for every tokenizer it knows")
    field.parts[field.data[0]][0] = True
