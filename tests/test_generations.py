import pytest

from pipeline.generations import Sample, copied_shares, describe, repeated_share, words


def test_words_fold_case_and_drop_punctuation_but_keep_apostrophes():
    assert words("Don't — STOP, it’s_fine 2x!") == ["don't", "stop", "it’s", "fine", "2x"]


def test_a_loop_repeats_and_plain_text_does_not():
    assert repeated_share(words("we will win and " * 10)) > 0.8
    assert repeated_share(words("nothing here is ever said in the same way twice")) == 0


def test_only_words_inside_a_run_shared_with_the_training_text_count_as_copied():
    training = ["the sea takes back what it has lent you", "other words entirely"]
    copied = words("And the sea takes back what it has, my friend")
    fresh = words("the sea takes nothing back from you today friend")
    shares = copied_shares([copied, fresh, []], training)
    assert shares == [pytest.approx(7 / 10), 0, 0]


def test_the_description_counts_own_stops():
    samples = [Sample("I", seed, f"I am number {seed}", stopped=seed < 3) for seed in range(4)]
    found = describe(samples, [])
    assert (found["stop_rate"], found["copied_share"], len(found["samples"])) == (0.75, 0, 4)
