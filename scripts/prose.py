"""General prose to calibrate on and to measure with, in whole documents that are on one side only.

206 articles of an old English Wikipedia and 300 news stories (Lee's background corpus), as the PyPI wheel of gensim
carries them for its own tests. No model of ours ever ships with them.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import os
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

WHEEL = "gensim==4.4.0"  # any release has these files; pinned so that the text never changes
NEWS = "gensim/test/test_data/lee_background.cor"
WIKI = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
HELD_OUT = 0.1  # share of the documents
SHORTEST = 200  # characters of a paragraph: shorter ones are headings, captions and lists


class Prose(NamedTuple):
    """Paragraphs; no document has some in both."""

    calibration: list[str]
    held_out: list[str]


def prose() -> Prose:
    with zipfile.ZipFile(wheel()) as archive:
        stories = [[line] for line in archive.read(NEWS).decode().splitlines() if line.strip()]
        dump = bz2.decompress(archive.read(WIKI)).decode()
    articles = [list(paragraphs(text)) for text in re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL)]
    documents = stories + [article for article in articles if article]
    held = [document for document in documents if is_held_out(document)]
    rest = [document for document in documents if not is_held_out(document)]
    return Prose([p for document in rest for p in document], [p for document in held for p in document])


def wheel() -> Path:
    """The wheel in the cache, fetched once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quotesmith" / "prose"
    if not list(cache.glob("gensim-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), WHEEL]
        subprocess.run(command, check=True)
    return next(cache.glob("gensim-*.whl"))


def is_held_out(document: list[str]) -> bool:
    return int.from_bytes(hashlib.sha256(document[0].encode()).digest()[:8]) / 2**64 < HELD_OUT


def paragraphs(markup: str) -> Iterator[str]:
    """The running text of an article, without its markup."""
    text = html.unescape(markup)
    for pattern in (r"<!--.*?-->", r"<ref[^>/]*/>", r"<ref.*?</ref>"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    while (inner := re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}", "", text)) != text:
        text = inner
    text = re.sub(r"\[\[(?:File|Image|Category)[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]+>", "", text)
    for line in text.split("\n"):
        if len(line) >= SHORTEST and line[0] not in "*#|=:;!{}<" and "|" not in line:
            yield line.strip()


def windows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, begin: int, length: int, seed: int
) -> list[list[int]]:
    """The texts, each after the `begin` token, joined and cut into windows of `length` tokens, shuffled."""
    ids: list[int] = []
    for text in texts:
        ids += [begin, *tokenizer(text + "\n", add_special_tokens=False)["input_ids"]]
    size = length - 1
    cut = [[begin, *ids[start : start + size]] for start in range(0, len(ids) - size + 1, size)]
    random.Random(seed).shuffle(cut)
    return cut
