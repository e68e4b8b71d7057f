import json
import random

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import DataError
from pipeline.safetensors_file import LONGEST_HEADER, Tensor, tensors_of


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WHOLE = {"a": entry([2, 3], 0, 24), "b": entry([2], 24, 28, "F16")}


def write(path, header, data=bytes(28), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_file_of_the_library_is_read_as_it_was_written(tmp_path):
    arrays = {"x": np.zeros((3, 4), np.float32), "y": np.zeros((0, 5), np.int64), "z": np.array(1, np.float16)}
    save_file(arrays, tmp_path / "m.safetensors", {"format": "pt"})
    found = tensors_of(tmp_path / "m.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "x": ("F32", (3, 4)),
        "y": ("I64", (0, 5)),
        "z": ("F16", ()),
    }
    assert sum(tensor.elements for tensor in found.values()) == 13


def test_tensors_may_stand_in_any_order(tmp_path):
    header = dict(reversed(WHOLE.items()))
    assert tensors_of(write(tmp_path / "m", header))["b"] == Tensor("F16", (2,), 24, 28)


HUGE = 2**62
BROKEN = {
    "shorter than a length": (b"", b"", None, "cut off"),
    "a header past the end": (WHOLE, bytes(28), HUGE, f"cut off: a header of {HUGE} bytes"),
    "no JSON": (b"{]", bytes(28), None, "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', bytes(28), None, "not JSON"),
    "deep JSON": (b"[" * 100_000, bytes(28), None, "not JSON"),
    "a list": ([], bytes(28), None, "not a JSON object"),
    "a name twice": (b'{"a": 1, "a": 2}', bytes(28), None, "twice"),
    "no description": ({"a": 5}, bytes(28), None, "is not described"),
    "more than a description": ({"a": {**WHOLE["a"], "x": 1}}, bytes(28), None, "is not described"),
    "a pickle's type": ({"a": entry([7], 0, 28, "object")}, bytes(28), None, "unknown type object"),
    "a type that is a list": ({"a": entry([7], 0, 28, [])}, bytes(28), None, "unknown type"),
    "a negative size": ({"a": entry([-7], 0, 28)}, bytes(28), None, "no list of whole numbers"),
    "sizes that are negative twice": ({"a": entry([-7, -1], 0, 28)}, bytes(28), None, "no list of whole numbers"),
    "a size that is true": ({"a": entry([True, 7], 0, 28)}, bytes(28), None, "no list of whole numbers"),
    "a size with a point": ({"a": entry([7.0], 0, 28)}, bytes(28), None, "no list of whole numbers"),
    "an absurd shape": ({"a": entry([2**40, 2**40], 0, 28)}, bytes(28), None, "shape and type contradict"),
    "an offset too many": ({"a": {**entry([7], 0, 28), "data_offsets": [0, 28, 5]}}, bytes(28), None, "no list of"),
    "offsets backwards": ({"a": entry([7], 28, 0)}, bytes(28), None, "shape and type contradict"),
    "overlapping": ({"a": entry([4], 0, 16), "b": entry([4], 12, 28)}, bytes(28), None, "b begins at byte 12"),
    "a hole": ({"a": entry([3], 0, 12), "b": entry([3], 16, 28)}, bytes(28), None, "byte 12 is the next free"),
    "cut": (WHOLE, bytes(27), None, "cut off or has foreign bytes"),
    "bytes at the end": (WHOLE, bytes(28) + b"PK\3\4", None, "foreign bytes at its end"),
}


@pytest.mark.fault("hostile files and names", "safetensors headers", "refused in one sentence")
@pytest.mark.parametrize("how", BROKEN)
def test_a_file_whose_header_does_not_describe_its_bytes_is_refused_in_one_sentence(how, tmp_path):
    header, data, length, found = BROKEN[how]
    path = write(tmp_path / "m.safetensors", header, data, length)
    if how == "shorter than a length":
        path.write_bytes(b"\3\0")
    with pytest.raises(DataError, match=found) as caught:
        tensors_of(path)
    assert str(caught.value).isprintable() and "m.safetensors" in str(caught.value) and len(str(caught.value)) < 500


def test_a_header_longer_than_any_models_is_not_read(tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write((LONGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(LONGEST_HEADER + 100)
    with pytest.raises(DataError, match="needed at most"):
        tensors_of(path)


def test_a_name_cannot_break_a_message(tmp_path):
    path = write(tmp_path / "m.safetensors", {"a\n\x1b[2J" + "b" * 10_000: 5})
    with pytest.raises(DataError) as caught:
        tensors_of(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_file_with_flipped_bytes_is_read_or_refused_and_never_anything_else(tmp_path, record_fault):
    path, chance, refused = tmp_path / "m.safetensors", random.Random(0), 0
    for _ in range(1000):
        data = bytearray(write(path, WHOLE).read_bytes())
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        try:
            assert all(tensor.end <= len(data) for tensor in tensors_of(path).values())
        except DataError:
            refused += 1
    assert 500 < refused < 1000
    record_fault(
        "hostile files and names", "a safetensors file with flipped and missing bytes", "refused, or whole", 1000
    )
