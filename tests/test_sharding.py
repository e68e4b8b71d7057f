import logging

import pytest
import torch
from pydantic import ValidationError

from pipeline import sharding
from pipeline.checkpoints import Checkpoints
from pipeline.config import JobConfig, ResumeConfig
from pipeline.team import launcher
from tests.test_team import base, predictions, tokens, tune  # noqa: F401  (fixtures)


@pytest.mark.slow
def test_a_model_in_shares_trains_to_the_result_of_a_whole_one_and_goes_on_to_the_same_bits(
    base,  # noqa: F811
    tokens,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(launcher, "WORKER", "tests.sharded_worker")
    kept = Checkpoints(tmp_path / "kept", ResumeConfig(minutes=0, steps=2))
    one = tune(base, tokens, tmp_path / "one")
    two = tune(base, tokens, tmp_path / "two", 2, kept, sharding="full")
    assert "weights are kept as {'DTensor'}" in caplog.text
    assert two.facts["total_parameters"] == one.facts["total_parameters"]
    for ours, theirs in zip(predictions(one), predictions(two), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert not list(kept.newest().rglob("*.bin"))  # pickles without weights_only
    again = tune(base, tokens, tmp_path / "again", 2, kept, sharding="full")
    assert again.facts["resumed"] == 4 and again.sha256 == two.sha256


def test_the_best_epoch_of_a_model_in_shares_is_refused_before_anything_is_done():
    settings = {"train": {"sharding": "full", "select_best": True}, "tokens": {"validation": 0.1}}
    with pytest.raises(ValidationError, match="cannot keep the best epoch of a model in shares"):
        JobConfig(**settings)


def test_a_whole_model_asks_for_no_sharding():
    assert sharding.arguments("none") == {}


@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"train": {"method": "qlora"}}])
def test_sharding_needs_gpus_and_all_weights(settings):
    train = {"sharding": "full", **settings.pop("train", {})}
    with pytest.raises(ValidationError, match="splits all weights"):
        JobConfig(train=train, **settings)
