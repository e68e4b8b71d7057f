import pytest

from pipeline.long_text import batches, joined, window

QUOTES = [[0, 11, 12, 9], [0, 21, 9], [0, 31, 32, 33, 9]]


def test_joined_quotes_keep_their_end_tokens_and_lose_their_begin_tokens():
    text = joined(QUOTES, seed=1)
    assert sorted(text) == sorted([11, 12, 9, 21, 9, 31, 32, 33, 9])
    parts = " ".join(map(str, text)).split(" 9")[:-1]
    assert sorted(part.strip() for part in parts) == ["11 12", "21", "31 32 33"]


def test_the_order_is_the_seeds():
    many = [[0, n, 9] for n in range(10, 40)]
    assert joined(many, 1) == joined(many, 1) != joined(many, 2)


def test_a_window_ends_in_the_quotes_after_what_fits_of_the_text_before():
    assert window([1, 2, 3, 4, 5], QUOTES[:2], 8) == [0, 4, 5, 11, 12, 9, 21, 9]
    assert window([1, 2], QUOTES[:2], 8) == [0, 1, 2, 11, 12, 9, 21, 9]
    assert window([1, 2], QUOTES[:2], 6) == [0, 11, 12, 9, 21, 9]


@pytest.mark.parametrize("length", [5, 9])
def test_a_window_that_cannot_be_made_is_an_error(length):
    with pytest.raises(ValueError, match=f"do not make a window of {length}"):
        window([1, 2], QUOTES[:2], length)


def test_batches_hold_whole_quotes_in_order_and_cut_only_what_never_fits():
    assert batches(QUOTES, 5) == [QUOTES[:2], QUOTES[2:]]
    assert batches(QUOTES, 9) == [QUOTES]
    assert batches(QUOTES, 2) == [[[0, 11, 12]], [[0, 21, 9]], [[0, 31, 32]]]
