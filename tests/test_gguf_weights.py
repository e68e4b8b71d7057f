import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import child
from pipeline.activations import HEAD
from pipeline.errors import CheckFailed
from pipeline.gguf_f16 import store_as_f16
from pipeline.gguf_file import GgufContents
from pipeline.gguf_names import matrix_names
from pipeline.gguf_proof import measure, rounded_model
from pipeline.gguf_weights import (
    head_tensor,
    load_weights,
    read_kquants,
    read_matrices,
    write_kquants,
    write_vectors,
)
from pipeline.kquants import KTYPES, KQuant, unpack
from pipeline.llama_cpp import logits
from pipeline.matrices import block_matrices, final_norm, find_blocks, weight_of
from pipeline.scoring import torch_logits

IDS = [50256, *range(100, 4000, 177), 50256]


@pytest.fixture(scope="module", params=["toy_gpt2", "wide_llama"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def f16(f16_of, checkpoint):
    return f16_of(checkpoint)


@pytest.fixture(scope="module")
def stock(f16, llama_cpp, tmp_path_factory):
    path = tmp_path_factory.mktemp("stock") / "toy-Q2_K.gguf"
    child.run([llama_cpp.program("llama-quantize"), f16, path, "Q2_K", "1"])
    return path


@pytest.fixture
def copy(stock, tmp_path):
    return shutil.copy(stock, tmp_path / "copy.gguf")


@pytest.fixture
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def shuffled(k, seed=0):
    """Of the same type and shape, with other codes and scales."""
    generator = torch.Generator().manual_seed(seed)

    def moved(values):
        return values.flatten()[torch.randperm(values.numel(), generator=generator)].reshape(values.shape)

    mins, dmin = (None if values is None else moved(values) for values in (k.mins, k.dmin))
    return KQuant(k.type, moved(k.codes), moved(k.scales), mins, moved(k.d), dmin)


def test_a_model_with_the_weights_of_its_f16_file_is_the_checkpoint_rounded(model, checkpoint, f16):
    load_weights(model.apply(spoil), f16)
    for (name, found), needed in zip(
        model.named_parameters(), rounded_model(GgufContents(f16), checkpoint).parameters(), strict=True
    ):
        assert torch.equal(found, needed), name


@torch.no_grad()
def spoil(module):
    for parameter in module.parameters(recurse=False):
        parameter.fill_(float("nan"))


@pytest.mark.parametrize("changed", [False, True])
def test_llama_cpp_predicts_what_torch_predicts_with_the_weights_of_a_quantized_file(model, copy, llama_cpp, changed):
    """Also of matrices that were written: rotary rows in another order would be found here."""
    if changed:
        kquants = {name: shuffled(k) for name, k in read_kquants(model, copy).items()}
        write_kquants(model, copy, kquants)
        for name, module in block_matrices(model).items():
            weight_of(module).copy_(kquants[name].dequantize())
        written = {name: weight_of(module).clone() for name, module in block_matrices(model).items()}
    load_weights(model, copy)
    if changed:
        assert all(torch.equal(weight_of(module), written[name]) for name, module in block_matrices(model).items())
    (ours,), (theirs,) = torch_logits(model, [IDS]), logits(llama_cpp, copy, [IDS])
    pair = (ours.log_softmax(-1), torch.from_numpy(theirs).log_softmax(-1))
    assert measure([pair])["rms"] < 0.02  # llama.cpp rounds what goes into a k-quant matrix to 8 bits


def test_what_is_read_and_written_back_leaves_the_file_byte_for_byte(model, stock, copy):
    load_weights(model, copy)
    kquants = read_kquants(model, copy)
    assert {k.type for k in kquants.values()} == {"Q2_K", "Q3_K"}
    assert kquants.keys() == block_matrices(model).keys()
    write_kquants(model, copy, kquants)
    write_vectors(model, copy)
    assert copy.read_bytes() == stock.read_bytes()


def test_matrices_that_are_written_are_read_again_and_nothing_else_changes(model, stock, copy):
    kquants = {name: shuffled(k) for name, k in read_kquants(model, copy).items() if ".1." in name}
    write_kquants(model, copy, kquants)
    found = read_kquants(model, copy)
    for name, k in kquants.items():
        assert torch.equal(found[name].dequantize(), k.dequantize()), name
    changed = set(matrix_names(model.config, kquants).values())
    before, after = GgufContents(stock).tensors, GgufContents(copy).tensors
    assert {name for name, t in before.items() if not np.array_equal(t.data, after[name].data)} == changed
    assert copy.stat().st_size == stock.stat().st_size


def test_the_head_is_written_under_its_name_in_the_file(model, copy):
    name = head_tensor(model)
    assert name == ("token_embd.weight" if model.config.tie_word_embeddings else "output.weight")
    stored = GgufContents(copy).tensors[name]
    assert stored.tensor_type.name == "Q6_K"
    k = shuffled(unpack(stored.data, "Q6_K"))
    write_kquants(model, copy, {HEAD: k})
    load_weights(model, copy)
    assert torch.equal(model.get_output_embeddings().weight, k.dequantize())


def test_matrices_are_read_dequantized_by_name(model, stock):
    load_weights(model, stock)
    modules = block_matrices(model)
    found = read_matrices(model, stock, list(modules)[2:5])
    assert list(found) == list(modules)[2:5]
    assert all(torch.equal(weight, weight_of(modules[name])) for name, weight in found.items())


@pytest.mark.parametrize("what", ["type", "shape"])
def test_bytes_of_another_type_or_shape_are_refused(model, copy, what):
    name, k = next((name, k) for name, k in read_kquants(model, copy).items() if k.type == "Q3_K")
    other = KQuant("Q6_K", k.codes, k.scales, None, k.d, None)
    if what == "shape":
        other = KQuant("Q3_K", k.codes[2:], k.scales[2:], None, k.d[2:], None)
    with pytest.raises(CheckFailed, match="packed were"):
        write_kquants(model, copy, {name: other})


@torch.no_grad()
def test_only_what_the_file_keeps_in_f32_is_written_as_the_model_has_it(model, stock, copy):
    load_weights(model, copy)
    for parameter in model.parameters():
        parameter.add_(1)
    write_vectors(model, copy)
    before, after = GgufContents(stock).tensors, GgufContents(copy).tensors
    changed = {name for name, tensor in before.items() if not np.array_equal(tensor.data, after[name].data)}
    assert changed == {name for name, tensor in before.items() if tensor.tensor_type.name == "F32"}
    for name in changed:
        assert np.array_equal(after[name].data, before[name].data + np.float32(1))


@torch.no_grad()
def test_a_vector_that_is_stored_in_f16_stays_as_it_is(model, copy):
    """As the positions of a file that was given more of them."""
    store_as_f16(copy, "output_norm.weight")
    stored = copy.read_bytes()
    load_weights(model, copy)
    final_norm(model).weight.add_(1)
    write_vectors(model, copy)
    assert copy.read_bytes() == stored


def test_a_file_of_another_model_is_refused_by_the_tensor_it_lacks(model, f16):
    blocks = find_blocks(model)[1]
    blocks.append(deepcopy(blocks[1]))
    model.config.num_hidden_layers = 3
    with pytest.raises(CheckFailed, match=r"no tensor for \S+\.2\.\S+ among its \d+; export it again"):
        load_weights(model, f16)


def test_every_k_quant_that_is_ours_is_read(f16, model, llama_cpp, tmp_path):
    path = tmp_path / "mixed.gguf"
    chosen = zip(matrix_names(model.config, block_matrices(model)).values(), [*KTYPES, "Q4_K"] * 4, strict=False)
    options = [part for name, kind in chosen for part in ("--tensor-type", f"^{name}$={kind}")]
    child.run([llama_cpp.program("llama-quantize"), *options, f16, path, "Q2_K", "1"])
    types = {name: tensor.tensor_type.name for name, tensor in GgufContents(path).tensors.items()}
    names = matrix_names(model.config, block_matrices(model))
    found = read_kquants(model, path)
    assert {name: k.type for name, k in found.items()} == {
        name: types[tensor] for name, tensor in names.items() if types[tensor] != "Q4_K"
    }
    assert {k.type for k in found.values()} == set(KTYPES)
