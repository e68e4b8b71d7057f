import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import scoring
from pipeline.scoring import Reference, compare, score, torch_logits

IDS = [50256, 40, 1842, 345, 50256]


@pytest.fixture(scope="module")
def model(toy_gpt2):
    return AutoModelForCausalLM.from_pretrained(toy_gpt2, dtype=torch.float32)


def test_the_nll_is_the_models_own_loss_end_token_included(model):
    loss = model(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS])).loss
    found = score(torch_logits(model, [IDS]), torch_logits(model, [IDS]), [IDS])
    assert found.tokens.tolist() == [4]
    assert found.nll[0] / 4 == pytest.approx(float(loss), rel=1e-5)


def test_a_model_agrees_with_itself_and_a_shifted_one_does_not():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    nll, tokens, kl, same_top = compare(logits, logits, [0, 1, 2, 3, 4])
    assert (kl, same_top, tokens) == (0, 4, 4)
    worse, _, kl, same_top = compare(-logits, logits, [0, 1, 2, 3, 4])
    assert kl > 0 and same_top < 4 and worse != nll


def test_kl_is_from_the_reference_to_the_model():
    reference, ours = torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    p, q = reference[0].softmax(0), ours[0].softmax(0)
    assert compare(ours, reference, [0, 1])[2] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_a_reference_too_large_to_keep_gives_the_same_logits(model, monkeypatch):
    kept = list(Reference(model, [IDS, IDS[:3]]))
    monkeypatch.setattr(scoring, "CACHE_BYTES", 0)
    again = Reference(model, [IDS, IDS[:3]])
    assert again.kept is None
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_an_engine_that_skips_a_quote_is_noticed(model):
    with pytest.raises(ValueError):
        score(torch_logits(model, [IDS]), torch_logits(model, [IDS, IDS]), [IDS, IDS])
