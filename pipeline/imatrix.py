"""llama.cpp's importance matrix: for each matrix of a model, the mean squared input of every column, as a GGUF.

The same as llama.cpp's tools/imatrix writes from a text, here from sums that a calibration pass already has: they
are the diagonal of X^T X, whose mean llama-quantize weights its rounding errors by.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter, Keys

from pipeline.errors import CheckFailed

TYPE = "imatrix"
SUMS, COUNTS = ".in_sum2", ".counts"


def write(path: Path, sums: dict[str, np.ndarray], counts: dict[str, int], *, chunk_size: int, dataset: str) -> None:
    """`path`, for llama-quantize --imatrix.

    `sums`: GGUF tensor to its squared inputs (columns,), summed over tokens; `counts`: how many tokens; `chunk_size`:
    tokens of one sequence at most; `dataset`: what the tokens were, for people. Raises `CheckFailed` for a tensor
    whose sums cannot be.
    """
    if not sums or sums.keys() != counts.keys():
        raise CheckFailed(
            f"an importance matrix needs sums and counts of the same tensors, at least one; found sums of {len(sums)} "
            f"and counts of {len(counts)}"
        )
    writer = GGUFWriter(path, arch="")  # it is no model: llama-imatrix writes no general.architecture either
    writer.add_type(TYPE)
    writer.add_array(Keys.IMatrix.DATASETS, [dataset])
    writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, -(-max(counts.values()) // chunk_size))
    writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, chunk_size)
    for name in sorted(sums):
        writer.add_tensor(name + SUMS, checked(name, sums[name], counts[name]))
        writer.add_tensor(name + COUNTS, np.array([counts[name]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def checked(name: str, sums: np.ndarray, count: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        squares = np.asarray(sums, dtype=np.float32)
    if count < 1 or not np.isfinite(squares).all() or (squares < 0).any():
        raise CheckFailed(
            f"the squared inputs of {name}, summed over {count} tokens, go from {squares.min():g} to "
            f"{squares.max():g}; needed are finite sums over at least one token: the model or its calibration text "
            "is broken"
        )
    return squares


def read(path: Path) -> dict[str, np.ndarray]:
    """GGUF tensor to its mean squared inputs (columns,) float32, ours or llama-imatrix's.

    Raises `CheckFailed` for a file that is not an importance matrix, or not whole.
    """
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as e:  # numpy's own words for reading past the end
        raise CheckFailed(f"{path} is not a whole GGUF file ({e}); delete its folder and run again") from e
    kind = reader.fields.get(Keys.General.TYPE)
    if kind is None or kind.contents() != TYPE:
        raise CheckFailed(f"{path} is not an importance matrix: its {Keys.General.TYPE} is not {TYPE}")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    return {
        name.removesuffix(SUMS): sums / stored[name.removesuffix(SUMS) + COUNTS]
        for name, sums in stored.items()
        if name.endswith(SUMS)
    }
