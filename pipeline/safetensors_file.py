"""A safetensors file looked through before anything loads it: its header must describe exactly the bytes there are.

The format: https://huggingface.co/docs/safetensors/en/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError
from pipeline.foreign_text import printable

LONGEST_HEADER = 16 * 1024 * 1024  # bytes; 100,000 tensors have less
LONGEST_NAME = 200  # characters of a name in a message
BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    start: int  # in bytes from the end of the header
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor by name. Raises `DataError` unless they lie end to end and fill the file, each as large as its
    shape and type say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DataError(f"{path.name} is cut off: a header of {length} bytes in a file of {size}; fetch it again")
        if length > LONGEST_HEADER:
            raise DataError(f"{path.name} has a header of {length} bytes; needed at most {LONGEST_HEADER}")
        header = parsed(file.read(length), path.name)
    header.pop("__metadata__", None)
    tensors = {name: tensor_of(path.name, name, entry) for name, entry in header.items()}
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.start != position:
            raise broken(path.name, name, f"begins at byte {tensor.start}, but byte {position} is the next free one")
        position = tensor.end
    if position != size - 8 - length:
        raise DataError(
            f"{path.name} is cut off or has foreign bytes at its end: its tensors have {position} bytes, but "
            f"{size - 8 - length} follow the header; fetch it again"
        )
    return tensors


def parsed(data: bytes, file: str) -> dict[str, Any]:
    try:
        header = json.loads(data, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{file} is no safetensors file: its header is not JSON ({e}); fetch it again") from e
    if not isinstance(header, dict):
        raise DataError(f"{file} is no safetensors file: its header is not a JSON object; fetch it again")
    return header


def once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Of two entries of one name, readers disagree which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def tensor_of(file: str, name: str, entry: Any) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise broken(file, name, "is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise broken(file, name, f"has the unknown type {printable(dtype, LONGEST_NAME)}")
    if not are_counts(shape) or not are_counts(offsets) or len(offsets) != 2:
        raise broken(file, name, "has a shape or offsets that are no list of whole numbers from 0")
    tensor = Tensor(dtype, tuple(shape), *offsets)
    if tensor.end - tensor.start != tensor.elements * BYTES[dtype]:
        raise broken(file, name, f"has {tensor.end - tensor.start} bytes, which its shape and type contradict")
    return tensor


def are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def broken(file: str, name: str, how: str) -> DataError:
    return DataError(f"{file} is broken: its tensor {printable(name, LONGEST_NAME)} {how}; fetch it again")
