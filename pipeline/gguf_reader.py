"""gguf-py's reader without the price of a vocabulary: for each of GPT-2's 100,000 strings it makes two arrays, which
takes 2 seconds every time a file is opened."""

from __future__ import annotations

import struct
from typing import Any

from gguf import GGUFReader, GGUFValueType

STRING_LENGTH = struct.Struct("<Q")

Parts = tuple[int, list[Any], list[int], list[GGUFValueType]]


class TensorReader(GGUFReader):  # type: ignore[misc]  # gguf-py has no types
    """Tensors and scalar metadata of a GGUF file. Arrays among the metadata have their types, but no contents."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Parts:
        if raw_type == GGUFValueType.ARRAY and self.byte_order == "I":
            kind = GGUFValueType(int(self._get(orig_offs, "<u4")[0]))
            length, start = int(self._get(orig_offs + 4, "<u8")[0]), orig_offs + 12
            if kind in self.gguf_scalar_to_np:
                return self.skipped(orig_offs, start + length * self.gguf_scalar_to_np[kind]().itemsize, kind)
            if kind == GGUFValueType.STRING:
                return self.skipped(orig_offs, after_strings(memoryview(self.data), start, length), kind)
        parts: Parts = super()._get_field_parts(orig_offs, raw_type)
        return parts

    def skipped(self, start: int, end: int, kind: GGUFValueType) -> Parts:
        if end > len(self.data):
            raise ValueError(f"an array goes on to byte {end} of a file of {len(self.data)}")
        return end - start, [], [], [GGUFValueType.ARRAY, kind]


def after_strings(data: memoryview, start: int, count: int) -> int:
    """Where `count` strings end that begin at `start`: each is its length, then its bytes."""
    for _ in range(count):
        if start + STRING_LENGTH.size > len(data):
            raise ValueError(f"a string goes on past byte {len(data)}, the last of the file")
        start += STRING_LENGTH.size + STRING_LENGTH.unpack_from(data, start)[0]
    return start
