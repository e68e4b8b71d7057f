import struct

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from pipeline.gguf_reader import TensorReader

LISTS = {
    "strings": ["", "a", "\u00e9" * 300, "\U0001f600"],
    "bytes": [1, 2, 3],
    "floats": [0.5, 1.5],
    "flags": [True, False],
}


@pytest.fixture
def written(tmp_path):
    writer = GGUFWriter(tmp_path / "f.gguf", arch="toy")
    writer.add_uint32("before", 7)
    for key, values in LISTS.items():
        writer.add_array(key, values)
    writer.add_string("after", "the lists")
    writer.add_tensor("matrix", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("halves", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "f.gguf"


def test_tensors_and_scalars_are_those_of_gguf_py(written):
    ours, theirs = TensorReader(written), GGUFReader(written)
    assert (ours.data_offset, ours.alignment) == (theirs.data_offset, theirs.alignment)
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert (a.name, a.tensor_type, a.data_offset, a.field.offset) == (
            b.name, b.tensor_type, b.data_offset, b.field.offset,
        )  # fmt: skip
        assert np.array_equal(a.data, b.data)
    assert list(ours.fields) == list(theirs.fields)
    for key, field in theirs.fields.items():
        assert ours.fields[key].types == field.types
        if GGUFValueType.ARRAY not in field.types:
            assert ours.fields[key].contents() == field.contents()


def test_a_real_vocabulary_is_passed_over(gpt2_vocab):
    ours, theirs = TensorReader(gpt2_vocab), GGUFReader(gpt2_vocab)
    assert list(ours.fields) == list(theirs.fields) and ours.data_offset == theirs.data_offset


def test_what_is_written_into_a_tensor_is_in_the_file(written):
    tensor = TensorReader(written, "r+").tensors[0]
    tensor.data[1, 2] = 99
    tensor.data.flush()
    assert GGUFReader(written).tensors[0].data[1, 2] == 99


@pytest.mark.parametrize("key", ["strings", "bytes", "floats", "flags"])
def test_a_list_that_claims_more_than_the_file_has_is_refused(written, key):
    """Where gguf-py would ask for more memory than there is, or read on into the tensors."""
    data = bytearray(written.read_bytes())
    at = data.index(key.encode()) + len(key) + 4 + 4
    assert struct.unpack_from("<Q", data, at)[0] == len(LISTS[key])
    struct.pack_into("<Q", data, at, 10_000)
    written.write_bytes(data)
    with pytest.raises(ValueError, match=r"goes on (to byte|past byte)"):
        TensorReader(written)
