import json
import math

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipeline import calibrate as module
from pipeline.artifacts import Checkpoint, Corpus, TokenDataset, sha256_of
from pipeline.calibrate import calibrate, fair_shares, load_calibration, write
from pipeline.config import CalibrationConfig, TokensConfig
from pipeline.errors import ConfigError
from pipeline.quotes import fold
from pipeline.tokens import load_split, split_of, tokenize

SPLIT = TokensConfig(max_length=24, holdout=0.3)
QUOTES = [f"Quote {n} says that {n * n} things happened on day {n + 3}." for n in range(40)]
EOT = 50256
END = 31  # of the small model that only writes


def on_side(side, template):
    """`template` with the first number that puts it on that side of the split."""
    texts = (template.format(n) for n in range(1000))
    return next(text for text in texts if split_of(fold(text), SPLIT) == side)


def corpus_in(folder, texts):
    folder.mkdir(exist_ok=True)
    path = folder / "quotes.jsonl"
    path.write_text("".join(json.dumps({"text": t, "source": "a.txt", "key": fold(t)}) + "\n" for t in texts))
    return Corpus(path, "0" * 64, ())


def tokenized(tuned, quotes, folder, split=SPLIT):
    folder.mkdir(exist_ok=True)
    return tokenize(corpus_in(folder, quotes), tuned, split, out=folder)


@pytest.fixture(scope="module")
def tuned(toy_gpt2):
    return Checkpoint.of(toy_gpt2, {})


@pytest.fixture(scope="module")
def tokens(tuned, tmp_path_factory):
    return tokenized(tuned, QUOTES, tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A tiny model that ends its texts by chance, and is quick to sample from."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("writer")
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=END + 1, **shape)).save_pretrained(folder)
    return Checkpoint(folder, "0" * 64)


def written(writer, count, max_length=48, seed=5):
    return write(writer, TokenDataset(writer.path, "0" * 64, END, END), count, max_length, "cpu", seed)


def calibrated(tuned, tokens, out, text=None, seed=3, split=SPLIT, **settings):
    cfg = CalibrationConfig(**{"generated": 0, **settings})
    return calibrate(tuned, tokens, text, cfg, split, device="cpu", seed=seed, out=out)


def rows_of(calibration):
    return [json.loads(line) for line in calibration.path.read_text().splitlines()]


def ids_of(tokens, split):
    return [list(ids) for ids in load_split(tokens, split)["input_ids"]]


def words_shown(tuned, calibration):
    """The texts of a calibration, folded."""
    tokenizer = AutoTokenizer.from_pretrained(tuned.path)
    return [fold(tokenizer.decode(row["ids"], skip_special_tokens=True)) for row in rows_of(calibration)]


def test_without_anything_else_it_is_the_training_quotes_and_no_held_out_one(tuned, tokens, tmp_path):
    calibration = calibrated(tuned, tokens, tmp_path)
    found = load_calibration(calibration, "train") + load_calibration(calibration, "validation")
    assert sorted(found) == sorted(ids_of(tokens, "train"))
    held_out = ids_of(tokens, "holdout")
    assert held_out and not any(ids in found for ids in held_out)
    assert calibration.sha256 == sha256_of(calibration.path)


def test_the_quotes_that_training_stopped_by_are_not_in_it_either(tuned, tmp_path):
    split = SPLIT.model_copy(update={"validation": 0.2})
    tokens = tokenized(tuned, QUOTES, tmp_path, split)
    found = [row["ids"] for row in rows_of(calibrated(tuned, tokens, tmp_path, split=split))]
    assert sorted(found) == sorted(ids_of(tokens, "train")) and ids_of(tokens, "validation")


def test_a_text_file_that_holds_the_quotes_shows_none_of_the_held_out_ones(tuned, tokens, tmp_path):
    others = [f"Something else, number {n}, that nobody has said on day {n}." for n in range(20)]
    calibration = calibrated(tuned, tokens, tmp_path, text=corpus_in(tmp_path / "text", QUOTES + others))
    shown = words_shown(tuned, calibration)
    held_out = [fold(text) for text in load_split(tokens, "holdout")["text"]]
    assert held_out and not any(quote in text for quote in held_out for text in shown)
    assert sum("something else" in text for text in shown) >= 10


def test_a_paragraph_that_holds_a_held_out_quote_among_other_words_is_left_out_too(tuned, tokens, tmp_path):
    held_out = load_split(tokens, "holdout")["text"]
    mixed = [on_side("train", f"As they said: “{quote.upper()}” and so on, number {{}}") for quote in held_out]
    harmless = [on_side("train", f"As they said, it is a fine day {n} and so on, number {{}}") for n in range(5)]
    text = corpus_in(tmp_path / "text", mixed + harmless)
    wide = SPLIT.model_copy(update={"max_length": 128})
    shown = words_shown(tuned, calibrated(tuned, tokens, tmp_path, text=text, split=wide))
    assert len(held_out) > 5 and not any(fold(quote) in text for quote in held_out for text in shown)
    assert set(map(fold, harmless)) <= set(shown)


def test_a_short_held_out_quote_is_found_in_a_paragraph_and_a_shorter_one_is_not_looked_for(tuned, tmp_path):
    """Two words are found in any text: looking for them would leave nothing."""
    short, tiny = on_side("holdout", "Trust nobody {}"), on_side("holdout", "Never {}")
    tokens = tokenized(tuned, [*QUOTES, short, tiny], tmp_path / "tokens")
    for quote, left in ((short, 0), (tiny, 1)):
        text = corpus_in(tmp_path / "text", [on_side("train", f"He said {quote} and went {{}}")])
        assert calibrated(tuned, tokens, tmp_path, text=text).facts["kinds"]["text"]["texts"] == left
    text = corpus_in(tmp_path / "text", [tiny])  # nothing but the quote
    assert calibrated(tuned, tokens, tmp_path, text=text).facts["kinds"]["text"]["texts"] == 0


def test_long_paragraphs_are_cut_into_pieces_that_each_begin_with_the_begin_token(tuned, tokens, tmp_path):
    paragraph = on_side("train", "one two three four five six seven eight nine ten " * 6 + "{}")
    text = corpus_in(tmp_path / "text", [paragraph])
    pieces = [row["ids"] for row in rows_of(calibrated(tuned, tokens, tmp_path, text=text)) if row["kind"] == "text"]
    whole = AutoTokenizer.from_pretrained(tuned.path)(paragraph)["input_ids"]
    assert len(pieces) == math.ceil((len(whole) + 1) / 23) == 3
    assert all(ids[0] == EOT and len(ids) <= 24 for ids in pieces)
    assert sorted(token for ids in pieces for token in ids[1:]) == sorted([*whole, EOT])
    assert sum(ids[-1] == EOT for ids in pieces) == 1


def test_an_end_mark_inside_a_text_is_text(tuned, tokens, tmp_path):
    text = corpus_in(tmp_path / "text", [on_side("train", "markup <|endoftext|> stays text {}")])
    pieces = [row["ids"] for row in rows_of(calibrated(tuned, tokens, tmp_path, text=text)) if row["kind"] == "text"]
    assert [ids.count(EOT) for ids in pieces] == [2]


def test_training_and_validation_have_no_text_in_common(tuned, tokens, tmp_path):
    text = corpus_in(tmp_path / "text", QUOTES)  # every training quote a second time
    calibration = calibrated(tuned, tokens, tmp_path, text=text, validation=0.4)
    train, validation = (load_calibration(calibration, split) for split in ("train", "validation"))
    assert len({tuple(ids) for ids in train + validation}) == len(train + validation)
    assert len(validation) == round(0.4 * len(train + validation)) == calibration.facts["validation_texts"]


@pytest.mark.parametrize("validation", [0.01, 0.5])
def test_both_splits_have_a_text_when_there_are_only_two(tuned, validation, tmp_path):
    quotes = [on_side(side, f"Say {n} {{}}") for n in range(2) for side in ("train", "holdout")]
    calibration = calibrated(tuned, tokenized(tuned, quotes, tmp_path / "tokens"), tmp_path, validation=validation)
    assert [len(load_calibration(calibration, split)) for split in ("train", "validation")] == [1, 1]


@pytest.mark.parametrize("twice", [False, True])
def test_a_single_text_is_refused_with_what_to_do_about_it(twice, tuned, tmp_path):
    quote = on_side("train", "Say {}")
    tokens = tokenized(tuned, [quote, *(on_side("holdout", f"Hear {n} {{}}") for n in range(2))], tmp_path / "tokens")
    text = corpus_in(tmp_path / "text", [quote]) if twice else None
    with pytest.raises(ConfigError, match=r"1 different texts.* at least 2; raise calibration.generated or name"):
        calibrated(tuned, tokens, tmp_path, text=text)


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tuned, tokens, tmp_path):
    hashes = []
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        hashes.append(calibrated(tuned, tokens, tmp_path / str(number), seed=seed, generated=2).sha256)
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("max_tokens", [256, 400])
def test_no_more_tokens_than_asked_for_and_every_kind_has_its_share(max_tokens, tuned, tokens, tmp_path):
    text = corpus_in(tmp_path / "text", [f"Other words {n} " * 4 for n in range(90)])
    calibration = calibrated(tuned, tokens, tmp_path, text=text, generated=12, max_tokens=max_tokens)
    kinds = calibration.facts["kinds"]
    assert calibration.facts["tokens"] == sum(len(row["ids"]) for row in rows_of(calibration)) <= max_tokens
    assert kinds.keys() == {"quotes", "text", "generated"}
    assert all(max_tokens / 3 - 24 <= kind["tokens"] <= max_tokens / 3 + 2 * 24 for kind in kinds.values())
    for kind, found in kinds.items():
        own = [row["ids"] for row in rows_of(calibration) if row["kind"] == kind]
        assert found == {"texts": len(own), "tokens": sum(map(len, own))}


def test_what_a_small_kind_leaves_goes_to_the_larger_ones():
    found = {"large": [[1] * 10] * 90, "small": [[2] * 10] * 2, "middle": [[3] * 10] * 30}
    chosen = fair_shares(found, 600, 0)
    assert {kind: len(sequences) for kind, sequences in chosen.items()} == {"small": 2, "middle": 29, "large": 29}


def test_texts_longer_than_their_share_are_cut_and_not_too_many():
    chosen = fair_shares({"a": [list(range(300))] * 3, "b": [list(range(300))] * 3}, 256, 0)
    assert {kind: list(map(len, sequences)) for kind, sequences in chosen.items()} == {"a": [128], "b": [128]}


def test_shares_are_drawn_from_all_of_a_kind_and_not_from_its_beginning():
    found = {"a": [[n] * 4 for n in range(200)]}
    chosen = fair_shares(found, 100, 0)["a"]
    assert len(chosen) == 25 and max(ids[0] for ids in chosen) > 100
    assert chosen == fair_shares(found, 100, 0)["a"] != fair_shares(found, 100, 1)["a"]


def test_of_a_large_corpus_only_as_many_quotes_are_read_as_can_be_needed(tokens):
    quotes = module.training_quotes(tokens, 5, seed=0)
    assert len(quotes) == 5 and all(ids in ids_of(tokens, "train") for ids in quotes)
    assert quotes != module.training_quotes(tokens, 5, seed=1)


def test_generated_texts_begin_with_the_begin_token_and_stop_at_their_first_end_token(writer):
    texts = written(writer, 96)
    assert 80 < len(texts) < 96  # it wrote a few that end at once: an empty text is dropped
    assert all(ids[0] == END and len(ids) > 2 for ids in texts)
    ended = [ids for ids in texts if ids[-1] == END]
    assert len(ended) > 20 and all(ids.count(END) == 2 for ids in ended)
    cut = [ids for ids in texts if ids[-1] != END]
    assert cut and all(len(ids) == 48 and ids.count(END) == 1 for ids in cut)


def test_generated_texts_are_seeded_and_leave_the_random_state_alone(writer, monkeypatch):
    state = torch.random.get_rng_state()
    texts = written(writer, 20)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert written(writer, 20) == texts != written(writer, 20, seed=6)
    monkeypatch.setattr(module, "BATCH", 8)
    assert 12 < len(written(writer, 20)) <= 20
