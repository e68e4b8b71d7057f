import math

import numpy as np
import pytest

from pipeline import ledger
from pipeline.scoring import Scores


def scores(nll, tokens):
    nll, tokens = np.array(nll, float), np.array(tokens, float)
    return Scores(nll, tokens, np.zeros_like(nll), tokens)


def test_perplexity_is_over_all_tokens_not_over_quotes():
    value = ledger.perplexity(scores([10, 1], [2, 8]), ledger.resample(2, 100, 0)).value
    assert value == pytest.approx(math.exp(11 / 10))


def test_a_model_compared_with_itself_has_a_ratio_of_exactly_one():
    same = scores([3, 5, 9], [2, 3, 4])
    assert ledger.ppl_ratio(same, same, ledger.resample(3, 100, 0)) == ledger.Interval(1, 1, 1)


def test_the_paired_interval_is_tighter_than_the_two_apart():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 40, 30).astype(float)
    hard = rng.gamma(4, 1, 30) * tokens  # quotes differ far more than the models do
    tuned, pruned = scores(hard, tokens), scores(hard + 0.1 * tokens, tokens)
    draws = ledger.resample(30, 2000, 0)
    alone, paired = ledger.perplexity(pruned, draws), ledger.ppl_ratio(pruned, tuned, draws)
    assert paired.value == pytest.approx(math.exp(0.1))
    assert (paired.high / paired.low) < 1.001 < (alone.high / alone.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        tokens = rng.integers(5, 40, 40).astype(float)
        found = ledger.perplexity(scores(rng.normal(3, 0.5, 40) * tokens, tokens), ledger.resample(40, 500, trial))
        hits += found.low <= math.exp(3) <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_bits_per_byte_divides_all_bits_by_all_bytes():
    assert ledger.bits_per_byte(scores([8 * math.log(2)], [3]), 4) == pytest.approx(2)


def test_a_ruined_model_gets_a_large_finite_number():
    assert math.isfinite(ledger.perplexity(scores([1e6], [1]), ledger.resample(1, 100, 0)).value)
