import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from pipeline import imatrix, llama_cpp
from pipeline.distill import Recipe, validate
from pipeline.errors import CheckFailed
from pipeline.export import convert
from pipeline.forecast import DATASET, IMATRIX, Choice
from pipeline.gguf_file import GgufContents
from pipeline.gguf_reader import TensorReader
from pipeline.gguf_weights import load_weights
from pipeline.sensitivity import divergence, finite, predictions, sensitivity

SEQUENCES = [[50256, *range(100, 112)], [50256, 7, 8, 9], [50256, 464, 1200]]
UP = {f"blk.{n}.ffn_up.weight": f"transformer.h.{n}.mlp.c_fc.weight" for n in range(2)}


@pytest.fixture(scope="module")
def f16(toy_gpt2, llama_cpp, tmp_path_factory):
    path = tmp_path_factory.mktemp("f16") / "toy-F16.gguf"
    convert(toy_gpt2, llama_cpp, "toy", path)
    return path


@pytest.fixture
def model(toy_gpt2):
    return AutoModelForCausalLM.from_pretrained(toy_gpt2, dtype=torch.float32).eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_one_role_costs_what_a_model_with_that_role_alone_rounded_diverges(model, f16, llama_cpp, tmp_path):
    roles = {"ffn_up": {"Q2_K": list(UP), "Q8_0": list(UP)}, "token_embd": {"Q4_K": ["token_embd.weight"]}}
    before = state(model)
    found = sensitivity(model, model, f16, SEQUENCES, roles, Choice(False), as_it_is, llama_cpp, tmp_path)
    assert {role: list(types) for role, types in found.items()} == {"ffn_up": ["Q2_K", "Q8_0"], "token_embd": ["Q4_K"]}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []

    recipe = Recipe(steps=0, batch_tokens=64, learning_rate=0, patience=1, precision="fp32", seed=0)
    expected = {}
    for role, kind in [("ffn_up", "Q2_K"), ("ffn_up", "Q8_0"), ("token_embd", "Q4_K")]:
        alone = rounded_alone(model, f16, kind, roles[role][kind], llama_cpp, tmp_path)
        expected[role, kind] = validate(alone, model, SEQUENCES, recipe)
    for (role, kind), kl in expected.items():
        assert found[role][kind] == pytest.approx(kl, rel=0.02, abs=2e-6)  # validate subtracts sums of ten nats
    assert 0 < found["ffn_up"]["Q8_0"] < found["ffn_up"]["Q2_K"] / 10


def rounded_alone(model, f16, kind, tensors, tools, folder):
    path = folder / "all.gguf"
    llama_cpp.quantize(tools, f16, path, "Q8_0", Choice(False, dict.fromkeys(tensors, kind)).arguments())
    rounded, alone = copy.deepcopy(model), copy.deepcopy(model)
    load_weights(rounded, path)
    own = [UP.get(tensor, "transformer.wte.weight") for tensor in tensors]
    alone.load_state_dict({name: rounded.state_dict()[name] for name in own}, strict=False)
    return alone


def as_it_is(path, kind):
    """An encoder that leaves everything to llama-quantize."""


def test_what_is_measured_is_what_the_encoder_makes_of_the_types_it_knows(model, f16, llama_cpp, tmp_path):
    def encode(path, kind):
        encoded.append(kind)
        stored = next(tensor for tensor in TensorReader(path, "r+").tensors if tensor.name in UP)
        stored.data[:] = 0
        stored.data.flush()

    encoded = []
    roles = {"ffn_up": dict.fromkeys(("Q3_K", "Q4_K"), tuple(UP))}
    found = sensitivity(model, model, f16, SEQUENCES, roles, Choice(False), encode, llama_cpp, tmp_path)["ffn_up"]
    assert encoded == ["Q3_K"]
    assert found["Q3_K"] > 10 * found["Q4_K"]


def test_a_llamas_interleaved_rows_and_its_own_head_are_measured_in_their_places(wide_llama, llama_cpp, tmp_path):
    """Queries in the wrong order would cost the same in every type."""
    f16 = tmp_path / "llama-F16.gguf"
    convert(wide_llama, llama_cpp, "llama", f16)
    model = AutoModelForCausalLM.from_pretrained(wide_llama, dtype=torch.float32).eval()
    tensors = {"attn_q": ["blk.0.attn_q.weight", "blk.1.attn_q.weight"], "output": ["output.weight"]}
    roles = {role: dict.fromkeys(("Q2_K", "Q8_0"), tuple(names)) for role, names in tensors.items()}
    found = sensitivity(model, model, f16, SEQUENCES, roles, Choice(False), as_it_is, llama_cpp, tmp_path)
    for role in roles:
        assert 0 <= found[role]["Q8_0"] < found[role]["Q2_K"] / 10


def test_the_importance_matrix_is_what_the_rounding_is_weighted_by(model, f16, llama_cpp, tmp_path):
    columns = {name: int(tensor.shape[0]) for name, tensor in GgufContents(f16).matrices.items()}
    sums = {name: np.linspace(0.01, 9, size) for name, size in columns.items()}
    imatrix.write(tmp_path / IMATRIX, sums, dict.fromkeys(sums, 1), chunk_size=1, dataset=DATASET)
    roles = {"ffn_up": {"Q2_K": list(UP)}}
    with_it, without = (
        sensitivity(model, model, f16, SEQUENCES, roles, Choice(importance), as_it_is, llama_cpp, tmp_path)["ffn_up"][
            "Q2_K"
        ]
        for importance in (True, False)
    )
    assert abs(with_it / without - 1) > 0.01


def test_the_divergence_is_torchs_over_the_predicted_tokens_of_all_batches(model):
    expected = list(predictions(model, SEQUENCES))
    assert sum(map(len, expected)) == sum(len(ids) - 1 for ids in SEQUENCES)
    torch.manual_seed(0)
    others = [(p + torch.randn_like(p)).log_softmax(-1) for p in expected]
    p, q = torch.cat(expected).double(), torch.cat(others).double()
    slow = kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert divergence(expected, iter(others)) == pytest.approx(slow, rel=1e-5)
    assert divergence(expected, predictions(model, SEQUENCES)) == pytest.approx(0, abs=1e-9)


def test_a_divergence_that_is_no_number_is_refused_by_role_and_type():
    assert finite(0.25, "ffn_up", "Q2_K") == 0.25
    with pytest.raises(CheckFailed, match="ffn_up stored as Q2_K moves the predictions by nan nats"):
        finite(float("nan"), "ffn_up", "Q2_K")
