import hashlib
import json

import pytest
from transformers import AutoTokenizer

from pipeline.artifacts import Checkpoint, Corpus, Source, sha256_of
from pipeline.config import TokensConfig
from pipeline.errors import DataError
from pipeline.tokens import SPLITS, load_split, split_of, tokenize

EOT = 50256


@pytest.fixture
def base(toy_gpt2):
    return Checkpoint.of(toy_gpt2, {})


def corpus_of(texts, folder):
    path = folder / "quotes.jsonl"
    path.write_text("".join(json.dumps({"text": t, "source": "a.txt", "key": t.lower()}) + "\n" for t in texts))
    source = Source("a.txt", "a.txt", "0" * 64, 1, len(texts), 0, 0, 0, len(texts))
    return Corpus(path, sha256_of(path), (source,))


@pytest.fixture
def corpus(tmp_path):
    return corpus_of([f"Quote number {i} has something to say" for i in range(60)], tmp_path)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def all_rows(tokens):
    return [row for split in SPLITS for row in load_split(tokens, split)]


def test_every_quote_begins_and_ends_with_end_of_text_and_is_in_one_split(corpus, base, out):
    tokens = tokenize(corpus, base, TokensConfig(holdout=0.3, validation=0.2), out=out)
    rows = all_rows(tokens)
    assert sorted(row["text"] for row in rows) == sorted(f"Quote number {i} has something to say" for i in range(60))
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    for row in rows:
        plain = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        assert row["input_ids"] == [EOT, *plain, EOT]
    assert all(len(load_split(tokens, split)) > 3 for split in SPLITS)


def test_a_quote_keeps_its_side_whatever_else_is_in_the_corpus():
    cfg = TokensConfig()
    sides = {key: split_of(key, cfg) for key in (f"quote {i}" for i in range(2000))}
    held = [key for key, side in sides.items() if side == "holdout"]
    assert 150 < len(held) < 250
    alone = {key: split_of(key, cfg) for key in reversed(list(sides)[::7])}
    assert all(sides[key] == side for key, side in alone.items())
    first = int.from_bytes(hashlib.sha256(held[0].encode()).digest()[:8])
    assert first / 2**64 < 0.1  # decided by the hash alone


def test_an_end_mark_inside_a_quote_is_text_and_not_the_end(base, tmp_path, out):
    texts = ["stop <|endoftext|> go on"] + [f"short {i}" for i in range(40)]
    tokens = tokenize(corpus_of(texts, tmp_path), base, TokensConfig(holdout=0.2), out=out)
    row = next(row for row in all_rows(tokens) if "stop" in row["text"])
    assert row["input_ids"].count(EOT) == 2


def test_a_larger_holdout_only_adds_quotes():
    keys = [f"quote {i}" for i in range(500)]
    small = {k for k in keys if split_of(k, TokensConfig(holdout=0.1)) == "holdout"}
    large = {k for k in keys if split_of(k, TokensConfig(holdout=0.2)) == "holdout"}
    assert small < large


def test_a_quote_that_is_cut_off_is_counted_and_does_not_teach_to_stop(base, tmp_path, out):
    texts = [f"short {i}" for i in range(40)] + ["word " * 50 + "ending"]
    tokens = tokenize(corpus_of(texts, tmp_path), base, TokensConfig(max_length=16, holdout=0.2), out=out)
    cut = [row for row in all_rows(tokens) if row["truncated"]]
    assert len(cut) == 1 and len(cut[0]["input_ids"]) == 16 and cut[0]["input_ids"][-1] != EOT
    assert sum(tokens.facts["splits"][split]["truncated"] for split in SPLITS) == 1


def test_a_quote_that_just_fits_keeps_its_end_token(base, tmp_path, out):
    texts = ["a b c d e f"] + [f"short {i}" for i in range(40)]  # 6 tokens and two marks
    tokens = tokenize(corpus_of(texts, tmp_path), base, TokensConfig(max_length=8, holdout=0.2), out=out)
    row = next(row for row in all_rows(tokens) if row["text"] == "a b c d e f")
    assert len(row["input_ids"]) == 8 and not row["truncated"]


def test_the_statistics_add_up(corpus, base, out):
    tokens = tokenize(corpus, base, TokensConfig(), out=out)
    splits, source = tokens.facts["splits"], tokens.facts["sources"]["a.txt"]
    assert sum(s["quotes"] for s in splits.values()) == source["quotes"] == 60
    assert source["tokens"] == sum(len(row["input_ids"]) for row in all_rows(tokens))
    assert source["length_tokens"]["p5"] <= source["length_tokens"]["p50"] <= source["length_tokens"]["max"]


def test_too_few_quotes_for_the_split_are_refused_with_the_numbers(base, tmp_path, out):
    with pytest.raises(DataError, match=r"2 usable quotes split into .* holdout needs at least 2"):
        tokenize(corpus_of(["one", "two"], tmp_path), base, TokensConfig(), out=out)


def test_the_same_corpus_gives_the_same_hash(corpus, base, tmp_path):
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        hashes.append(tokenize(corpus, base, TokensConfig(), out=tmp_path / name).sha256)
    assert hashes[0] == hashes[1]
