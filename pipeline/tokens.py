"""Corpus to tokens: split by quote, tokenize, learn where a quote ends.

An example is `begin, quote tokens, end`. The begin token (the tokenizer's own, or its end token when it has
none) lets the first word be learned and scored too; the end token is what makes generations stop.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.artifacts import Checkpoint, Corpus, Facts, TokenDataset
from pipeline.config import TokensConfig
from pipeline.errors import DataError

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "holdout")
BATCH = 1000  # quotes tokenized at once; bounds memory on a corpus of gigabytes
SCHEMA = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "text": pa.string(), "source": pa.string(), "truncated": pa.bool_()}
)
FEWEST_HELD_OUT = 2  # an interval over quotes needs at least two of them


def tokenize(corpus: Corpus, base: Checkpoint, cfg: TokensConfig, *, out: Path) -> TokenDataset:
    """Split `corpus` by quote and tokenize it with `base`'s tokenizer; one Arrow stream a split in `out`."""
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    end = int(tokenizer.eos_token_id)
    begin = end if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    lengths: dict[str, list[tuple[str, int, bool]]] = {split: [] for split in SPLITS}
    digest = hashlib.sha256()
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(pa.ipc.new_stream(str(out / f"{split}.arrow"), SCHEMA)) for split in SPLITS
        }
        for rows in examples(corpus, tokenizer, begin, end, cfg):
            for split in SPLITS:
                chosen = [row for where, row in rows if where == split]
                writers[split].write_batch(pa.RecordBatch.from_pylist(chosen, schema=SCHEMA))
                lengths[split] += [(row["source"], len(row["input_ids"]), row["truncated"]) for row in chosen]
                digest.update(json.dumps([split, [row["input_ids"] for row in chosen]]).encode())
    require_enough(lengths, cfg)
    return TokenDataset(out, digest.hexdigest(), begin, end, facts=statistics(corpus, lengths, cfg.max_length))


def load_split(tokens: TokenDataset, split: str) -> Dataset:
    """One split, memory-mapped; columns input_ids, text, source, truncated. Empty when the split is empty."""
    return Dataset.from_file(str(tokens.path / f"{split}.arrow"))


def split_of(key: str, cfg: TokensConfig) -> str:
    """Where a quote belongs, from the hash of its folded text alone: it never moves between runs, whatever
    else is in the corpus, and two spellings of one quote always fall on the same side."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    if place < cfg.holdout:
        return "holdout"
    return "validation" if place < cfg.holdout + cfg.validation else "train"


def examples(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, begin: int, end: int, cfg: TokensConfig
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    with corpus.path.open(encoding="utf-8") as file:
        while lines := list(islice(file, BATCH)):
            quotes = [json.loads(line) for line in lines]
            texts = [quote["text"] for quote in quotes]
            # split_special_tokens: "<|endoftext|>" inside a quote is text, as llama.cpp takes it, not an end.
            encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            yield [
                (split_of(quote["key"], cfg), example(quote, ids, begin, end, cfg.max_length))
                for quote, ids in zip(quotes, encoded, strict=True)
            ]


def example(quote: dict[str, str], ids: list[int], begin: int, end: int, max_length: int) -> dict[str, Any]:
    """A quote that is cut off gets no end token: it does not end there."""
    whole = [begin, *ids, end]
    return {
        "input_ids": whole if len(whole) <= max_length else whole[:max_length],
        "text": quote["text"],
        "source": quote["source"],
        "truncated": len(whole) > max_length,
    }


def require_enough(lengths: dict[str, list[tuple[str, int, bool]]], cfg: TokensConfig) -> None:
    counts = {split: len(rows) for split, rows in lengths.items()}
    needed = {"train": 1, "validation": 1 if cfg.validation else 0, "holdout": FEWEST_HELD_OUT}
    for split, least in needed.items():
        if counts[split] < least:
            raise DataError(
                f"{sum(counts.values())} usable quotes split into {counts['train']} for training, "
                f"{counts['validation']} for validation and {counts['holdout']} held out; {split} needs at "
                f"least {least}: add quotes, or change tokens.holdout ({cfg.holdout:g})"
            )


def statistics(corpus: Corpus, lengths: dict[str, list[tuple[str, int, bool]]], max_length: int) -> Facts:
    rows = [row for split in SPLITS for row in lengths[split]]
    return {
        "max_length_tokens": max_length,
        "splits": {split: describe(lengths[split]) for split in SPLITS},
        "sources": {s.name: describe([row for row in rows if row[0] == s.name]) for s in corpus.sources},
    }


def describe(rows: list[tuple[str, int, bool]]) -> Facts:
    """Counts and the length distribution in tokens, begin and end tokens included."""
    sizes = np.array([length for _, length, _ in rows], dtype=np.int64)
    percentiles = {f"p{p}": int(np.percentile(sizes, p)) for p in (5, 50, 95)} if len(rows) else {}
    return {
        "quotes": len(rows),
        "tokens": int(sizes.sum()),
        "truncated": sum(truncated for _, _, truncated in rows),
        "length_tokens": {**percentiles, "max": int(sizes.max())} if len(rows) else {},
    }
