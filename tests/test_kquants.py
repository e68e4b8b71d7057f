import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

from pipeline import child
from pipeline.errors import CheckFailed
from pipeline.export import convert
from pipeline.kquants import KTYPES, KQuant, pack, unpack

KINDS = sorted(KTYPES)
HALVES = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)}  # where d, and dmin, lie in a block
FINITE = np.arange(1 << 16, dtype=np.uint16)[np.isfinite(np.arange(1 << 16, dtype=np.uint16).view(np.float16))]


def random_kquant(kind, rows, columns=256, seed=0):
    rng, ktype = np.random.default_rng(seed), KTYPES[kind]

    def integers(low, high, width, dtype):
        return torch.from_numpy(rng.integers(low, high + 1, (rows, columns // width)).astype(dtype))

    def halves():
        return torch.from_numpy(rng.choice(FINITE, (rows, columns // 256)).view(np.float16))

    return KQuant(
        type=kind,
        codes=integers(0, ktype.max_code, 1, np.uint8),
        scales=integers(ktype.min_scale, ktype.max_scale, 16, np.int16),
        mins=integers(0, ktype.max_min, 16, np.int16) if ktype.max_min else None,
        d=halves(),
        dmin=halves() if ktype.max_min else None,
    )


def with_each_value_at_each_place(k, name, low, high):
    """`k` with every value of one field at every position of a block, between what is there."""
    field = getattr(k, name)
    values, places = torch.meshgrid(torch.arange(low, high + 1), torch.arange(field.shape[1]), indexing="ij")
    field[torch.arange(values.numel()), places.flatten()] = values.flatten().to(field.dtype)
    return k


def random_bytes(kind):
    """A block a row: every value of every byte among random ones, and every finite d and dmin."""
    rng, (start, end) = np.random.default_rng(1), HALVES[kind]
    data = rng.integers(0, 256, (len(FINITE), end), dtype=np.uint8)
    values, places = np.meshgrid(np.arange(256), np.arange(start), indexing="ij")
    data[np.arange(values.size), places.ravel()] = values.ravel()
    for at in range(start, end, 2):
        data[:, at : at + 2] = rng.permutation(FINITE)[:, None].view(np.uint8)
    return data


def same(a, b):
    """Equal values of equal types; float16 and float32 by their bits, so that -0 is not 0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def assert_equal(k, other):
    assert k.type == other.type
    for field in fields(KQuant)[1:]:
        a, b = getattr(k, field.name), getattr(other, field.name)
        assert (a is b is None) or same(a, b), field.name


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_comes_back_from_every_position(kind):
    codes = KTYPES[kind].max_code + 1
    k = with_each_value_at_each_place(random_kquant(kind, 256 * codes), "codes", 0, codes - 1)
    assert_equal(unpack(pack(k), kind), k)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scale_comes_back_from_every_position(kind):
    low, high = KTYPES[kind].min_scale, KTYPES[kind].max_scale
    k = with_each_value_at_each_place(random_kquant(kind, 16 * (high - low + 1)), "scales", low, high)
    assert_equal(unpack(pack(k), kind), k)


def test_every_minimum_comes_back_from_every_position():
    k = with_each_value_at_each_place(random_kquant("Q2_K", 16 * 16), "mins", 0, 15)
    assert_equal(unpack(pack(k), "Q2_K"), k)


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_comes_back_and_decodes_as_in_gguf_py_bit_for_bit(kind):
    data = random_bytes(kind)
    k = unpack(data, kind)
    assert np.array_equal(pack(k), data)
    assert same(k.dequantize(), torch.from_numpy(dequantize(data, GGMLQuantizationType[kind])))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_several_blocks_decode_as_in_gguf_py_bit_for_bit(kind):
    k = random_kquant(kind, 7, 3 * 256)
    data = pack(k)
    assert data.shape == (7, 3 * KTYPES[kind].block_bytes)
    assert same(k.dequantize(), torch.from_numpy(dequantize(data, GGMLQuantizationType[kind])))
    assert_equal(unpack(data, kind), k)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_that_is_no_contiguous_memory_packs_the_same(kind):
    k = random_kquant(kind, 5, 512)
    turned = {f.name: v.T.contiguous().T for f in fields(KQuant)[1:] if (v := getattr(k, f.name)) is not None}
    assert np.array_equal(pack(replace(k, **turned)), pack(k))
    columnwise = np.asfortranarray(pack(k))
    assert_equal(unpack(columnwise, kind), k)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_py_knows_the_size_of_a_block_but_cannot_encode_one(kind):
    assert GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == (256, KTYPES[kind].block_bytes)
    with pytest.raises(NotImplementedError):
        quantize(np.zeros((1, 256), dtype=np.float32), GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_take_as_many_bytes_as_any_other_weights(kind):
    k = random_kquant(kind, 4, 512)
    zeros = replace(k, codes=torch.full_like(k.codes, KTYPES[kind].zero_code))
    assert pack(zeros).nbytes == pack(k).nbytes == 8 * KTYPES[kind].block_bytes


def test_the_zero_code_is_exactly_zero_in_the_symmetric_types():
    for kind in ("Q3_K", "Q6_K"):
        k = random_kquant(kind, 4)
        assert not replace(k, codes=torch.full_like(k.codes, KTYPES[kind].zero_code)).dequantize().any()


@pytest.fixture(scope="module")
def stock(small_base, small_tools, tmp_path_factory):
    """A toy model as F16 and as llama-quantize's Q2_K, whose tensors are of all three types."""
    folder = tmp_path_factory.mktemp("stock")
    f16, q2_k = folder / "f16.gguf", folder / "q2_k.gguf"
    convert(small_base, small_tools, "toy", f16)
    child.run([small_tools.program("llama-quantize"), f16, q2_k, "Q2_K", "1"])
    return f16, q2_k


def k_quants_in(path, mode="r"):
    found = [tensor for tensor in GGUFReader(path, mode).tensors if tensor.tensor_type.name in KTYPES]
    assert {tensor.tensor_type.name for tensor in found} == set(KTYPES)
    return found


def test_llama_cpp_decodes_packed_bytes_to_the_same_bits(stock, llama_cpp, tmp_path):
    packed, decoded = tmp_path / "packed.gguf", tmp_path / "decoded.gguf"
    shutil.copyfile(stock[1], packed)
    expected = {}
    for seed, tensor in enumerate(k_quants_in(packed, "r+")):
        columns, rows = tensor.shape.tolist()
        expected[tensor.name] = random_kquant(tensor.tensor_type.name, rows, columns, seed)
        tensor.data[:] = pack(expected[tensor.name])
        tensor.data.flush()
    child.run([llama_cpp.program("llama-quantize"), "--allow-requantize", packed, decoded, "F32", "1"])
    seen = {tensor.name: tensor for tensor in GGUFReader(decoded).tensors}
    for name, k in expected.items():
        assert seen[name].tensor_type.name == "F32"
        assert same(torch.from_numpy(np.array(seen[name].data)), k.dequantize()), name


def test_what_llama_quantize_wrote_comes_back(stock):
    for tensor in k_quants_in(stock[1]):
        assert np.array_equal(pack(unpack(tensor.data, tensor.tensor_type.name)), tensor.data), tensor.name


def test_libgguf_is_a_true_reference_for_llama_quantize(stock):
    libgguf = pytest.importorskip("libgguf")
    dense = {tensor.name: tensor.data.astype(np.float32) for tensor in GGUFReader(stock[0]).tensors}
    for tensor in k_quants_in(stock[1]):
        assert np.array_equal(libgguf.quantize_rows(dense[tensor.name], int(tensor.tensor_type)), tensor.data)


def spoil(k, name, value):
    field = getattr(k, name).clone()
    field[-1, -1] = value
    return replace(k, **{name: field})


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("Q2_K", "codes", 4, "Q2_K codes .* from 0 to 4; needed integers from 0 to 3"),
        ("Q3_K", "codes", 8, "needed integers from 0 to 7"),
        ("Q6_K", "codes", 64, "needed integers from 0 to 63"),
        ("Q2_K", "scales", -1, "Q2_K scales .* from -1 to 15; needed integers from 0 to 15"),
        ("Q2_K", "scales", 16, "needed integers from 0 to 15"),
        ("Q3_K", "scales", 32, "needed integers from -32 to 31"),
        ("Q3_K", "scales", -33, "needed integers from -32 to 31"),
        ("Q6_K", "scales", 128, "needed integers from -128 to 127"),
        ("Q2_K", "mins", 16, "needed integers from 0 to 15"),
        ("Q2_K", "d", float("inf"), "Q2_K d .* with 1 values that are not finite"),
        ("Q2_K", "dmin", float("nan"), "Q2_K dmin .* with 1 values that are not finite"),
    ],
)
def test_what_a_type_cannot_hold_is_refused(kind, name, value, message):
    with pytest.raises(CheckFailed, match=message):
        pack(spoil(random_kquant(kind, 99), name, value))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Q2_K", {"mins": None}, "needed both mins and dmin for Q2_K only"),
        ("Q2_K", {"dmin": None}, "needed both mins and dmin for Q2_K only"),
        ("Q2_K", {"mins": None, "dmin": None}, "needed both mins and dmin for Q2_K only"),
        ("Q3_K", {"mins": torch.zeros(2, 16), "dmin": torch.zeros(2, 1)}, "needed both mins and dmin for Q2_K only"),
        ("Q3_K", {"codes": torch.zeros(2, 255, dtype=torch.uint8)}, "a multiple of 256"),
        ("Q3_K", {"scales": torch.zeros(2, 15, dtype=torch.int16)}, r"scales of shape \(2, 15\); needed \(2, 16\)"),
        ("Q3_K", {"scales": torch.zeros(2, 16)}, r"scales of type torch\.float32"),
        ("Q3_K", {"d": torch.zeros(2, 1)}, r"d of type torch\.float32 .* needed finite float16"),
        ("Q3_K", {"type": "Q4_K"}, "found Q4_K codes"),
    ],
)
def test_a_matrix_that_does_not_fit_together_is_refused(kind, changes, message):
    with pytest.raises(CheckFailed, match=message):
        pack(replace(random_kquant(kind, 2), **changes))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (np.zeros((2, 83), dtype=np.uint8), "Q2_K"),
        (np.zeros((2, 84), dtype=np.int8), "Q2_K"),
        (np.zeros(84, dtype=np.uint8), "Q2_K"),
        (np.zeros((2, 144), dtype=np.uint8), "Q4_K"),
    ],
)
def test_bytes_that_are_no_whole_blocks_are_refused(data, kind):
    with pytest.raises(CheckFailed, match=rf"found {kind} data .* Q2_K \(84 bytes\)"):
        unpack(data, kind)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_decodes_and_packs_to_the_same_bits(kind):
    k = random_kquant(kind, 300, 512)
    moved = {f.name: v.cuda() for f in fields(KQuant)[1:] if (v := getattr(k, f.name)) is not None}
    on_gpu = replace(k, **moved)
    assert same(on_gpu.dequantize().cpu(), k.dequantize())
    assert np.array_equal(pack(on_gpu), pack(k))
