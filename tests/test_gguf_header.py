import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from pipeline import gguf_header
from pipeline.errors import DataError
from pipeline.gguf_guard import check_from_outside
from pipeline.gguf_header import Broken, check

TYPES = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
U32, STR, ARR = 4, 8, 9


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name, shape, kind, offset):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(entries=(), tensors=(), data=b"", version=3, counts=None, magic=b"GGUF"):
    n_tensors, n_entries = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_entries) + b"".join((*entries, *tensors))
    return head + bytes(-len(head) % 32) + data


ALIGN = entry("general.alignment", U32, struct.pack("<I", 32))
WORDS = entry("tokens", ARR, struct.pack("<IQ", STR, 2) + text("a") + text("b"))
ONE = tensor("a", [256], 10, 0)
WHOLE = file_of([ALIGN, WORDS], [ONE, tensor("b", [4, 2], 0, 96)], bytes(128))


def checked(path, data):
    path.write_bytes(data)
    check(path, TYPES)


def test_what_gguf_py_writes_is_whole(tmp_path, gpt2_vocab):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list(["a", "b"])
    writer.add_float32("x", 1.0)
    writer.add_array("scores", [1.0, 2.0])
    writer.add_tensor("a", np.zeros((2, 256), np.float32))
    writer.add_tensor("b", np.zeros(7, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check(tmp_path / "m.gguf", TYPES)
    check_from_outside(tmp_path / "m.gguf")
    check_from_outside(gpt2_vocab)
    checked(tmp_path / "own.gguf", WHOLE)


HUGE = 2**63
BROKEN = {
    "empty": (b"", "is not a GGUF file"),
    "another file": (b"PK\3\4" + bytes(100), "is not a GGUF file"),
    "only a magic": (b"GGUF", "cut off"),
    "the first version": (file_of(version=1), "GGUF version 1"),
    "big-endian": (file_of(version=3 << 24), "GGUF version"),
    "tensors without end": (file_of(counts=(HUGE, 0)), f"claims {HUGE} tensors"),
    "metadata without end": (file_of(counts=(0, HUGE)), "entries; needed at most"),
    "tensors that are not there": (file_of(counts=(60_000, 0)), "cut off"),
    "a key without end": (file_of([struct.pack("<Q", HUGE)]), "string of"),
    "a key past the end": (file_of([struct.pack("<Q", 1 << 20)]), "cut off"),
    "a key that is no text": (file_of([entry(b"\xff\xfe", U32, bytes(4))]), "not UTF-8"),
    "a key twice": (file_of([WORDS, WORDS]), "has 'tokens' twice"),
    "a type of its own": (file_of([entry("x", 99, b"")]), "metadata of the type 99"),
    "an array without end": (file_of([entry("x", ARR, struct.pack("<IQ", U32, HUGE))]), "cut off"),
    "strings without end": (file_of([entry("x", ARR, struct.pack("<IQ", STR, HUGE))]), "cut off"),
    "strings that add up": (file_of([entry("x", ARR, struct.pack("<IQQ", STR, 1, HUGE))]), "cut off"),
    "arrays in arrays": (file_of([entry("x", ARR, struct.pack("<IQ", ARR, 2**40) * 1000)]), "metadata of the type 9"),
    "an alignment of 0": (file_of([entry("general.alignment", U32, bytes(4))]), "the alignment 0"),
    "an alignment of 24": (file_of([entry("general.alignment", U32, struct.pack("<I", 24))]), "the alignment 24"),
    "an alignment of 2 GiB": (file_of([entry("general.alignment", U32, struct.pack("<I", 2**31))]), "the alignment"),
    "a long name": (file_of([], [tensor("x" * 65, [256], 10, 0)], bytes(96)), "string of 65 bytes"),
    "no dimensions": (file_of([], [tensor("x", [], 0, 0)], bytes(96)), "0 dimensions"),
    "five dimensions": (file_of([], [tensor("x", [1] * 5, 0, 0)], bytes(96)), "5 dimensions"),
    "dimensions without end": (file_of([], [text("x") + struct.pack("<I", 2**32 - 1)]), "4294967295 dimensions"),
    "an empty tensor": (file_of([], [tensor("x", [0, 5], 0, 0)], bytes(96)), "impossible shape"),
    "half a block": (file_of([], [tensor("x", [128], 10, 0)], bytes(96)), "impossible shape"),
    "an unknown type": (file_of([], [tensor("x", [256], 4, 0)], bytes(96)), "unknown tensor type 4"),
    "shapes that overflow": (file_of([], [tensor("x", [2**62, 4, 4, 4], 0, 0)], bytes(96)), "cut off"),
    "an offset that overflows": (file_of([], [tensor("x", [1], 0, 2**64 - 32)], bytes(96)), "cut off"),
    "an odd offset": (file_of([], [tensor("x", [1], 0, 1)], bytes(96)), "no multiple of 32"),
    "one in another": (file_of([], [ONE, tensor("x", [1], 0, 64)], bytes(128)), "within another tensor"),
    "two of one place": (file_of([], [ONE, tensor("x", [256], 10, 0)], bytes(128)), "within another tensor"),
    "a tensor twice": (file_of([], [ONE, tensor("a", [256], 10, 96)], bytes(256)), "has a tensor twice"),
    "data cut off": (WHOLE[:-1], "ends at byte"),
}


@pytest.mark.fault("hostile files and names", "GGUF headers", "refused in one sentence")
@pytest.mark.parametrize("how", BROKEN)
def test_a_header_that_does_not_describe_its_file_is_refused_soon(how, tmp_path):
    data, found = BROKEN[how]
    started = time.monotonic()
    with pytest.raises(Broken, match=found):
        checked(tmp_path / "m.gguf", data)
    assert time.monotonic() - started < 30


def test_a_file_with_flipped_bytes_is_whole_or_broken_and_never_anything_else(tmp_path, record_fault):
    chance, broken = random.Random(0), 0
    for _ in range(1000):
        data = bytearray(WHOLE)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            checked(tmp_path / "m.gguf", bytes(data[: chance.choice([len(data), chance.randrange(len(data))])]))
        except Broken:
            broken += 1
    assert 500 < broken < 1000
    record_fault("hostile files and names", "a GGUF file with flipped and missing bytes", "refused, or whole", 1000)


def test_the_guard_says_what_is_wrong_in_one_sentence(tmp_path):
    (tmp_path / "m.gguf").write_bytes(file_of([], [tensor("x\n\x1b[2J", [256], 4, 0)], bytes(96)))
    with pytest.raises(DataError, match=r"^m\.gguf has the unknown tensor type 4 in .*; fetch it again") as caught:
        check_from_outside(tmp_path / "m.gguf")
    assert str(caught.value).isprintable()


ABUSES = {
    "memory": "bytearray(2 << 30)",
    "time": "import signal, time; signal.alarm(1); time.sleep(60)",
    "the processor": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
    "the disk": "open('big', 'wb').write(bytes(4 << 20))",
}


@pytest.mark.fault("hostile files and names", "a GGUF reader gone wild", "ended by its limits")
@pytest.mark.parametrize("what", ABUSES)
def test_a_reader_that_goes_wrong_is_ended_by_its_limits(what, tmp_path):
    code = f"from pipeline import gguf_header; gguf_header.limit()\n{ABUSES[what]}"
    environment = {"PYTHONPATH": str(Path(gguf_header.__file__).parent.parent)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, timeout=30, cwd=tmp_path, env=environment)
    assert ended.returncode != 0


def test_a_reader_that_was_ended_is_bad_data(tmp_path, monkeypatch):
    (tmp_path / "reads.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)")
    monkeypatch.setattr(gguf_header, "__file__", str(tmp_path / "reads.py"))
    with pytest.raises(DataError, match="could not be looked through within 60 s and 1024 MiB"):
        check_from_outside(tmp_path / "m.gguf")


def test_the_reader_needs_nothing_but_the_standard_library(tmp_path):
    (tmp_path / "m.gguf").write_bytes(WHOLE)
    command = [
        sys.executable,
        "-I",
        "-S",
        gguf_header.__file__,
        str(tmp_path / "m.gguf"),
        '{"10": [256, 84], "0": [1, 4]}',
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0
