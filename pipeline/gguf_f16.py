"""Stores one tensor of a GGUF file as F16 that llama.cpp's converter writes as F32 whatever it is asked for."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from pipeline.gguf_reader import TensorReader


def store_as_f16(path: Path, name: str) -> None:
    """Rounds the F32 tensor `name` of `path` to F16 and moves up what lies behind it; the rest stays as it is.

    llama-quantize leaves tables of positions as they are, so a quantized file has it in F16 too. A value beyond F16
    becomes infinite, which `prove_tensors` finds.
    """
    reader = TensorReader(path)
    header = bytearray(reader.data[: reader.data_offset])
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(header)
        for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
            data, kind = tensor.data, tensor.tensor_type
            if tensor.name == name:
                with np.errstate(over="ignore"):
                    data, kind = data.astype(np.float16), GGMLQuantizationType.F16
            # type and offset end a tensor's entry in the header, which therefore keeps its length
            entry = sum(part.nbytes for part in tensor.field.parts)
            offset = file.tell() - len(header)
            struct.pack_into("<IQ", header, tensor.field.offset + entry - 12, kind, offset)
            file.write(data.tobytes())
            file.write(bytes(-file.tell() % reader.alignment))
        file.seek(0)
        file.write(header)
    temporary.replace(path)
