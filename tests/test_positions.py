import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.errors import ConfigError
from pipeline.positions import FILLS, extend_positions, require_extendable, steady, table_of


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_layer=2, n_embd=16, n_head=2, n_positions=64, n_ctx=64)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(params=FILLS)
def extended(model, request):
    longer = copy.deepcopy(model)
    extend_positions(longer, 250, FILLS[request.param])
    return longer


def test_the_rows_it_had_stay_bit_by_bit(model, extended):
    table = table_of(extended).weight
    assert table.shape == (250, 16)
    assert torch.equal(table[:64], table_of(model).weight)


def test_short_texts_are_predicted_exactly_as_before(model, extended):
    ids = torch.randint(0, 100, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, extended(ids).logits)


def test_a_text_as_long_as_the_new_context_runs_and_one_longer_does_not(extended):
    with torch.inference_mode():
        assert torch.isfinite(extended(torch.ones((1, 250), dtype=torch.long)).logits).all()
        with pytest.raises(IndexError):
            extended(torch.ones((1, 251), dtype=torch.long))


def test_the_config_says_so_and_a_saved_model_comes_back_that_long(extended, tmp_path):
    assert extended.config.n_positions == extended.config.n_ctx == extended.config.max_position_embeddings == 250
    extended.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(table_of(again).weight, table_of(extended).weight)


def test_no_new_row_is_a_beginning_of_text_or_the_row_that_training_never_used(model, extended):
    old, new = table_of(model).weight, table_of(extended).weight[64:]
    for row in (old[0], old[1], old[-1]):
        assert not (new == row).all(dim=1).any()


def test_repeated_rows_keep_their_neighbours(model):
    """Row r is followed by row r + 1, but for the seams."""
    trained = table_of(model).weight.data
    for fill, period in ((FILLS["later_half"], trained[32:63]), (FILLS["most"], trained[2:63])):
        rows = fill(trained, 100)
        for start in range(0, 100, len(period)):
            stretch = rows[start : start + len(period)]
            assert torch.equal(stretch, period[: len(stretch)])


def test_steady_rows_are_all_the_mean_of_the_last_trained_ones(model):
    trained = table_of(model).weight.data
    rows = steady(trained, 5)
    assert rows.shape == (5, 16) and torch.equal(rows[0], rows[4])
    assert torch.allclose(rows[0], sum(trained[n] for n in range(47, 63)) / 16, atol=1e-7)


@pytest.mark.parametrize(
    ("context", "sentence"),
    [
        (63, "export.context 63 would shrink the table of the base model's 64 positions; choose more, or leave it out"),
        (64, "export.context 64 adds nothing to the base model's 64 positions"),
    ],
)
def test_a_context_that_is_not_longer_is_refused(model, context, sentence):
    with pytest.raises(ConfigError, match=sentence):
        extend_positions(copy.deepcopy(model), context)


def test_a_model_without_a_table_is_refused_and_told_what_it_has():
    config = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    sentence = "the base model is a llama, whose 256 positions are rotary, computed without a table"
    with pytest.raises(ConfigError, match=sentence):
        require_extendable(config, 4096)
    with pytest.raises(ConfigError, match=sentence):
        extend_positions(LlamaForCausalLM(config), 4096)
