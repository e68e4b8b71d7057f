"""A GGUF file from outside is looked through by another process first, which can be lost: gguf_header.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from gguf import GGML_QUANT_SIZES

from pipeline import child, gguf_header
from pipeline.errors import DataError
from pipeline.foreign_text import printable

LONGEST_FINDING = 500  # characters


def check_from_outside(path: Path) -> None:
    """Raises `DataError` for a file whose header does not describe its own bytes, or cannot be read within limits."""
    types = json.dumps({int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    command = [sys.executable, "-I", "-S", str(gguf_header.__file__), str(path.resolve()), types]
    with child.started(command, stdout=subprocess.DEVNULL) as (process, stderr):
        if (code := process.wait()) == 0:
            return
        said = child.text_of(stderr).strip().rpartition("\n")[2]
    if code < 0:
        said = f"could not be looked through within {gguf_header.SECONDS} s and {gguf_header.MEMORY_BYTES >> 20} MiB"
    raise DataError(f"{path.name} {printable(said, LONGEST_FINDING)}; fetch it again, or give another file")
