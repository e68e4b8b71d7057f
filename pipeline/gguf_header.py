"""The header of a GGUF file, read as if somebody hostile had written it. A program of its own, of the standard library
alone: `gguf_guard.py` runs it in a process whose time and memory are limited, before anything else reads the file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO

SECONDS = 60
MEMORY_BYTES = 1 << 30
MOST = 1 << 16  # tensors, or entries of the metadata
LONGEST_STRING = 16 << 20  # bytes
LONGEST_NAME = 64
LARGEST_ALIGNMENT = 1 << 20
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
STRING, ARRAY, UINT32 = 8, 9, 4
ALIGNMENT = "general.alignment"

Types = dict[int, tuple[int, int]]  # by number: weights and bytes of a block


class Broken(Exception):
    """What is wrong, to follow the file's name."""


class Reader:
    """Little-endian numbers and strings, never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    @property
    def left(self) -> int:
        return self.size - self.file.tell()

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise Broken(f"is cut off: {count} bytes are to follow at byte {self.file.tell()} of {self.size}")
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.left:
            raise Broken(f"is cut off: {count} bytes are to follow at byte {self.file.tell()} of {self.size}")
        self.file.seek(count, 1)

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0])

    def string(self, longest: int) -> str:
        length = self.number("Q")
        if length > longest:
            raise Broken(f"has a string of {length} bytes; needed at most {longest}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as e:
            raise Broken(f"has a name that is not UTF-8 ({e})") from e


def check(path: Path, types: Types) -> None:
    """Raises `Broken` unless every count, string, shape and offset agrees with the file."""
    with path.open("rb") as file:
        reader = Reader(file, path.stat().st_size)
        if reader.left < 4 or reader.take(4) != b"GGUF":
            raise Broken("is not a GGUF file")
        if (version := reader.number("I")) not in (2, 3):
            raise Broken(f"has the GGUF version {version}; needed 2 or 3, little-endian")
        tensors, entries = reader.number("Q"), reader.number("Q")
        if max(tensors, entries) > MOST:
            raise Broken(f"claims {tensors} tensors and {entries} entries; needed at most {MOST} of each")
        alignment = check_metadata(reader, entries)
        places = [tensor(reader, types, alignment) for _ in range(tensors)]
        check_places(places, reader, alignment)


def check_metadata(reader: Reader, entries: int) -> int:
    """The alignment of tensors, in bytes."""
    keys, alignment = set(), 32
    for _ in range(entries):
        key, kind = reader.string(LONGEST_STRING), reader.number("I")
        if key in keys:
            raise Broken(f"has {key!a:.80} twice")
        keys.add(key)
        if key == ALIGNMENT and kind == UINT32:
            alignment = reader.number("I")
        else:
            skip_value(reader, kind)
    if not 1 <= alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise Broken(f"has the alignment {alignment}; needed a power of two up to {LARGEST_ALIGNMENT}")
    return alignment


def skip_value(reader: Reader, kind: int) -> None:
    if kind != ARRAY:
        return skip_values(reader, kind, 1)
    kind, count = reader.number("I"), reader.number("Q")
    skip_values(reader, kind, count)


def skip_values(reader: Reader, kind: int, count: int) -> None:
    if kind in SIZES:
        reader.skip(count * SIZES[kind])
    elif kind == STRING:
        if count > reader.left // 8:
            raise Broken(f"is cut off: {count} strings are to follow at byte {reader.file.tell()} of {reader.size}")
        for _ in range(count):
            reader.skip(reader.number("Q"))
    else:
        raise Broken(f"has metadata of the type {kind}, which no language model has")


def tensor(reader: Reader, types: Types, alignment: int) -> tuple[int, int, str]:
    """(offset, bytes, name)."""
    name = reader.string(LONGEST_NAME)
    if not 1 <= (dimensions := reader.number("I")) <= 4:
        raise Broken(f"has {dimensions} dimensions in {name!a}; needed 1 to 4")
    shape = [reader.number("Q") for _ in range(dimensions)]
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in types:
        raise Broken(f"has the unknown tensor type {kind} in {name!a}")
    weights, size = types[kind]
    if min(shape) < 1 or shape[0] % weights:
        raise Broken(f"has the impossible shape {shape} in {name!a}")
    if offset % alignment:
        raise Broken(f"has {name!a} at byte {offset}, which is no multiple of {alignment}")
    return offset, math.prod(shape) // weights * size, name


def check_places(places: list[tuple[int, int, str]], reader: Reader, alignment: int) -> None:
    """Tensors may not overlap, nor reach past the end."""
    start = -(-reader.file.tell() // alignment) * alignment
    if len({name for _, _, name in places}) < len(places):
        raise Broken("has a tensor twice")
    free = 0
    for offset, size, name in sorted(places):
        if offset < free:
            raise Broken(f"has {name!a} within another tensor")
        free = offset + size
        if start + free > reader.size:
            raise Broken(f"is cut off: {name!a} ends at byte {start + free} of {reader.size}")


def limit() -> None:
    """Time by the clock and of the processor, memory, and no way to write."""
    signal.alarm(SECONDS)
    for kind, most in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def main() -> None:
    limit()
    types = {int(kind): tuple(sizes) for kind, sizes in json.loads(sys.argv[2]).items()}
    try:
        check(Path(sys.argv[1]), types)
    except Broken as e:
        sys.exit(f"{e}")
    except MemoryError:
        sys.exit(f"needs more than {MEMORY_BYTES >> 20} MiB for its header")


if __name__ == "__main__":
    main()
