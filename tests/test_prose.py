import random

import pytest
from transformers import AutoTokenizer

from scripts.prose import Prose, is_held_out, paragraphs, prose, windows

LONG = "The river rose in the night and took the lower bridge with it, as it had done every spring since the mill. "


def test_an_article_loses_its_markup_and_keeps_its_running_text():
    markup = (
        "{{Infobox river|name=Weir|{{nested|x}}}}\n== Course ==\n"
        f"'''The Weir''' is a [[river]] in [[Somewhere|the north]].<ref>Page 3</ref> {LONG * 2}&quot;Yes.&quot;\n"
        f"* a list item {LONG * 2}\n[[File:weir.jpg|thumb|The [[weir]] in flood]]\n"
        f"{LONG * 2}See [http://example.org the survey].<!-- not this -->\nToo short.\n"
    )
    first, second = paragraphs(markup)
    assert first.startswith("The Weir is a river in the north. The river rose") and first.endswith('"Yes."')
    assert second.endswith("See the survey.")
    assert not any(sign in first + second for sign in "{}[]<>|")


def test_windows_have_one_length_begin_alike_and_hold_every_text_once(toy_gpt2):
    tokenizer = AutoTokenizer.from_pretrained(toy_gpt2)
    texts = [f"{number}: {LONG}" for number in range(40)]
    found = windows(texts, tokenizer, 50256, 32, seed=0)
    assert {len(ids) for ids in found} == {32} and {ids[0] for ids in found} == {50256}
    words = tokenizer.decode([token for ids in found for token in ids[1:] if token != 50256])
    assert all(words.count(f"{number}:") <= 1 for number in range(10, 40))
    assert sum(f"{number}:" in words for number in range(10, 40)) > 20
    assert found != windows(texts, tokenizer, 50256, 32, seed=1)


def test_a_tenth_of_the_documents_is_held_out_by_what_they_begin_with():
    generator = random.Random(0)
    documents = [[f"{generator.random()} begins", "and goes on"] for _ in range(2000)]
    share = sum(map(is_held_out, documents)) / len(documents)
    assert 0.08 < share < 0.12
    assert all(is_held_out([first, "another end"]) == is_held_out([first]) for first, _ in documents[:50])


@pytest.mark.slow
def test_the_prose_is_large_enough_and_no_paragraph_is_on_both_sides():
    found = prose()
    assert isinstance(found, Prose)
    assert sum(map(len, found.calibration)) > 1_500_000 and sum(map(len, found.held_out)) > 120_000
    assert not set(found.calibration) & set(found.held_out)
    assert not any(sign in paragraph for paragraph in found.held_out for sign in ("[[", "{{", "<ref"))
