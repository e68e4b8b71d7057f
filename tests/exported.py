"""What export needs and makes, built by hand for the tests of the stages around it."""

import json

from pipeline.artifacts import Checkpoint, Corpus
from pipeline.config import TokensConfig
from pipeline.tokens import tokenize

QUOTES = [
    "I feel like a million dollars, and I'm worth 3,000,000 of them.",
    "Don't stop \u2014 you can't: \u201cnobody does\u201d, they said\u2026",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f600 naïve",
    "tabs\tand  two spaces   and three",
    "markup <|endoftext|> inside a quote stays text",
    *(f"Quote number {n} is about {n * n} things that happened on day {n}." for n in range(40)),
]


def corpus_in(folder, quotes=QUOTES):
    path = folder / "quotes.jsonl"
    path.write_text("".join(json.dumps({"text": q, "source": "a.txt", "key": q.lower()}) + "\n" for q in quotes))
    return Corpus(path, "0" * 64, ())


def inputs(checkpoint, folder):
    """Checkpoint, corpus and tokens, as `export` takes them."""
    model, corpus = Checkpoint(checkpoint, "0" * 64), corpus_in(folder)
    out = folder / "tokens"
    out.mkdir()
    return model, corpus, tokenize(corpus, model, TokensConfig(holdout=0.3), out=out)
