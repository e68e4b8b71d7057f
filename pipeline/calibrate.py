"""The text that compression measures the model on and learns from: training quotes, text that the tuned model writes
itself, and optionally a text file. Never the hold-out: nothing that decides a weight may see what the ledger uses."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer

from pipeline.artifacts import Calibration, Checkpoint, Corpus, Facts, TokenDataset, sha256_of
from pipeline.config import CalibrationConfig, TokensConfig
from pipeline.device import arithmetic_of
from pipeline.errors import ConfigError
from pipeline.loading import load_fp32
from pipeline.progress import bar
from pipeline.quotes import fold
from pipeline.tokens import load_split, split_of

log = logging.getLogger(__name__)

BATCH = 96  # texts sampled at once
TOP_P = 0.95  # without it, a small model's long tail of unlikely tokens makes gibberish of a tenth of the texts
RUN = 8  # words in a row that two texts share only when one was copied from the other
FEWEST_WORDS = 3  # a shorter quote is found anywhere

Sequences = list[list[int]]


def calibrate(
    tuned: Checkpoint,
    tokens: TokenDataset,
    text: Corpus | None,
    cfg: CalibrationConfig,
    split: TokensConfig,
    *,
    device: str,
    seed: int,
    out: Path,
) -> Calibration:
    """Token sequences of at most `split.max_length`, in a training and a validation split.

    Raises `ConfigError` when there are fewer than two sequences.
    """
    found = {"quotes": training_quotes(tokens, cfg.max_tokens, seed)}
    if text:
        found["text"] = list(windows(text, tuned, tokens, split))
    if cfg.generated:
        found["generated"] = write(tuned, tokens, cfg.generated, split.max_length, device, seed)
    chosen = fair_shares(distinct(found), cfg.max_tokens, seed)
    rows = [(kind, ids) for kind, sequences in chosen.items() for ids in sequences]
    if len(rows) < 2:
        raise ConfigError(
            f"calibration has {len(rows)} different texts, needed are at least 2; raise calibration.generated or name "
            "a calibration.text"
        )
    random.Random(seed).shuffle(rows)
    held = max(1, round(cfg.validation * len(rows)))
    path = out / "calibration.jsonl"
    with path.open("w") as file:
        for number, (kind, ids) in enumerate(rows):
            row = {"split": "validation" if number < held else "train", "kind": kind, "ids": ids}
            file.write(json.dumps(row) + "\n")
    facts = describe(chosen) | {"validation_texts": held}
    log.info("calibrate: %d texts, %d tokens (%s)", len(rows), facts["tokens"], ", ".join(chosen))
    return Calibration(path, sha256_of(path), facts)


def load_calibration(calibration: Calibration, split: str) -> Sequences:
    """Token ids of the split `train` or `validation`, one list a text."""
    with calibration.path.open() as file:
        rows = (json.loads(line) for line in file)
        return [row["ids"] for row in rows if row["split"] == split]


def training_quotes(tokens: TokenDataset, most: int, seed: int) -> Sequences:
    """All, or `most` of them drawn at random: of a corpus of gigabytes only those are read into memory."""
    quotes = load_split(tokens, "train")
    if len(quotes) > most:
        quotes = quotes.select(random.Random(seed).sample(range(len(quotes)), most))
    return [list(ids) for ids in quotes["input_ids"]]


def windows(text: Corpus, tuned: Checkpoint, tokens: TokenDataset, split: TokensConfig) -> Iterator[list[int]]:
    """The paragraphs of a text file as begin, tokens, end, cut into pieces that each start with the begin token.

    Whatever would fall into the hold-out if it were a quote is left out, and so is what holds a quote of the hold-out
    among other words: a file that holds the quotes themselves shows none of those that the ledger is measured on.
    """
    tokenizer = AutoTokenizer.from_pretrained(tuned.path)
    size = split.max_length - 1
    held_out = set().union(*(telling_runs(text) for text in load_split(tokens, "holdout")["text"]))
    with text.path.open(encoding="utf-8") as file:
        for quote in map(json.loads, file):
            if split_of(quote["key"], split) == "holdout" or not held_out.isdisjoint(all_runs(quote["key"])):
                continue
            ids = tokenizer(quote["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids.append(tokens.end_id)
            yield from ([tokens.begin_id, *ids[start : start + size]] for start in range(0, len(ids), size))


def telling_runs(quote: str) -> set[str]:
    """What another text shares with `quote` only if it holds it: runs of `RUN` words, or all words of a shorter one."""
    words = fold(quote).split()
    return runs(words, min(len(words), RUN)) if len(words) >= FEWEST_WORDS else set()


def all_runs(key: str) -> set[str]:
    words = key.split()
    return {run for size in range(FEWEST_WORDS, RUN + 1) for run in runs(words, size)}


def runs(words: list[str], size: int) -> set[str]:
    return {" ".join(words[start : start + size]) for start in range(len(words) - size + 1)}


@torch.inference_mode()
def write(tuned: Checkpoint, tokens: TokenDataset, count: int, max_length: int, device: str, seed: int) -> Sequences:
    """`count` texts that `tuned` writes after its begin token, each to its end token or `max_length` tokens."""
    model = load_fp32(tuned, device)
    precision = arithmetic_of("auto", device).name
    texts: Sequences = []
    with torch.random.fork_rng(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        torch.manual_seed(seed)
        for start in bar(range(0, count, BATCH), "calibrate: generate"):
            begin = torch.full((min(BATCH, count - start), 1), tokens.begin_id, device=device)
            written = model.generate(
                begin,
                attention_mask=torch.ones_like(begin),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=TOP_P,
                max_new_tokens=max_length - 1,
                eos_token_id=tokens.end_id,
                pad_token_id=tokens.end_id,
            )
            texts += [ended(row, tokens.end_id) for row in written.tolist()]
    return [ids for ids in texts if len(ids) > 2]  # an empty text teaches nothing


def ended(ids: list[int], end: int) -> list[int]:
    """Up to and with the first end token after the begin token."""
    return ids[: ids.index(end, 1) + 1] if end in ids[1:] else ids


def distinct(found: dict[str, Sequences]) -> dict[str, Sequences]:
    """Every sequence once, in the first kind that has it: else validation could hold what training learns."""
    seen: set[tuple[int, ...]] = set()
    kept: dict[str, Sequences] = {}
    for kind, sequences in found.items():
        own = {tuple(ids): ids for ids in sequences if tuple(ids) not in seen}
        kept[kind] = list(own.values())
        seen |= own.keys()
    return kept


def fair_shares(found: dict[str, Sequences], max_tokens: int, seed: int) -> dict[str, Sequences]:
    """At most `max_tokens`, the same from every kind of text; what a small kind leaves, the larger ones get."""
    chosen: dict[str, Sequences] = {}
    left = max_tokens
    by_size = sorted(found, key=lambda kind: sum(map(len, found[kind])))
    for number, kind in enumerate(by_size):
        share = left // (len(by_size) - number)
        chosen[kind] = first_of(random.Random(seed).sample(found[kind], len(found[kind])), share)
        left -= sum(map(len, chosen[kind]))
    return chosen


def first_of(sequences: Sequences, most_tokens: int) -> Sequences:
    """As many as fit; the first is cut where it alone does not."""
    taken: Sequences = []
    for ids in sequences:
        if len(ids) > most_tokens:
            return taken or [ids[:most_tokens]]
        most_tokens -= len(ids)
        taken.append(ids)
    return taken


def describe(chosen: dict[str, Sequences]) -> Facts:
    return {
        "tokens": sum(len(ids) for sequences in chosen.values() for ids in sequences),
        "kinds": {kind: {"texts": len(s), "tokens": sum(map(len, s))} for kind, s in chosen.items()},
    }
