import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.adapters import merged, with_adapters
from pipeline.config import TrainConfig
from pipeline.fourbit import load_nf4


@pytest.fixture(scope="module")
def toy_llama(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("toy-llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def dense(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def disturbed(adapted):
    """As after training: adapters start at zero, and a merge that does nothing would pass unseen."""
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return adapted.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 34)[None]).logits


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("toy", ["toy_gpt2", "toy_llama"])
def test_the_merged_model_computes_what_the_adapted_one_did(method, toy, request):
    path = request.getfixturevalue(toy)
    start = load_nf4(path, "cpu") if method == "qlora" else dense(path)
    adapted = disturbed(with_adapters(start, TrainConfig(method=method, lora_rank=4)))
    expected = logits(adapted)
    model = merged(adapted, dense(path))
    assert (logits(model) - expected).abs().max() < 1e-4
    assert (logits(dense(path)) - expected).abs().max() > 0.01


@pytest.mark.parametrize(("toy", "matrices"), [("toy_gpt2", 4), ("toy_llama", 7)])
def test_every_block_matrix_has_an_adapter_and_the_head_has_none(toy, matrices, request):
    adapted = with_adapters(dense(request.getfixturevalue(toy)), TrainConfig(method="lora"))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 2 * matrices  # an A and a B in each of two blocks
    assert all("lora_" in name and ".lm_head." not in name for name in trained)
