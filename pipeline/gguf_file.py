"""A GGUF file read back: what is really in it, measured on its own bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize

from pipeline.artifacts import Facts
from pipeline.errors import CheckFailed
from pipeline.gguf_reader import TensorReader

BLOCK_MATRIX = re.compile(r"blk\.\d+\..*\.weight")
CHUNK_WEIGHTS = 1 << 22  # dequantized at once: 16 MiB as float32


class GgufContents:
    """Tensors by name, and metadata: scalars only, those of the architecture without its prefix.

    Raises `CheckFailed` for a file that is cut off or torn.
    """

    def __init__(self, path: Path) -> None:
        try:
            reader = TensorReader(path)
        except (ValueError, IndexError, KeyError, OSError) as e:  # numpy's own words for reading past the end
            raise CheckFailed(f"{path} is not a whole GGUF file ({e}); delete its folder and run again") from e
        self.path = path
        last = reader.tensors[-1].field
        self.header_bytes = int(last.offset + sum(part.nbytes for part in last.parts))  # before it is aligned
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        prefix = f"{reader.fields['general.architecture'].contents()}."
        self.metadata: dict[str, Any] = {
            key.removeprefix(prefix): field.contents()
            for key, field in reader.fields.items()
            if GGUFValueType.ARRAY not in field.types
        }

    @cached_property
    def matrices(self) -> dict[str, ReaderTensor]:
        """The linear layers of the blocks: what gets pruned; embeddings, head, norms and biases are not among them."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if BLOCK_MATRIX.fullmatch(name) and len(tensor.shape) > 1
        }

    def describe(self) -> Facts:
        """Types as stored, bits a weight over all tensors, zeros counted after dequantizing."""
        parameters = sum(int(tensor.n_elements) for tensor in self.tensors.values())
        by_tensor = zero_counts(self.matrices)
        weights = sum(int(tensor.n_elements) for tensor in self.matrices.values())
        return {
            "tensors": len(self.tensors),
            "parameters": parameters,
            "bits_per_weight": 8 * sum(int(tensor.n_bytes) for tensor in self.tensors.values()) / parameters,
            "tensor_types": dict(Counter(tensor.tensor_type.name for tensor in self.tensors.values())),
            "matrix_types": self.matrix_types(),
            "matrices": len(self.matrices),
            "zeros": sum(by_tensor.values()) / weights,
            "zeros_by_type": self.zeros_by_type(by_tensor),
            "zeros_by_tensor": {name: n / int(self.tensors[name].n_elements) for name, n in by_tensor.items()},
        }

    def zeros_by_type(self, by_tensor: dict[str, int]) -> dict[str, float]:
        """Share of zeros of all block matrices of a type."""
        zeros: Counter[str] = Counter()
        weights: Counter[str] = Counter()
        for name, count in by_tensor.items():
            kind = self.tensors[name].tensor_type.name
            zeros[kind] += count
            weights[kind] += int(self.tensors[name].n_elements)
        return {kind: zeros[kind] / weights[kind] for kind in sorted(weights)}

    def matrix_types(self) -> dict[str, dict[str, int]]:
        """Role (ffn_up, token_embd, …) to how many tensors of each type it has; vectors are left out."""
        roles: dict[str, Counter[str]] = {}
        for name, tensor in self.tensors.items():
            if len(tensor.shape) > 1:
                roles.setdefault(role_of(name), Counter())[tensor.tensor_type.name] += 1
        return {role: dict(counts) for role, counts in sorted(roles.items())}


def role_of(tensor: str) -> str:
    """What the tensor is in its block or in the model: blk.0.ffn_up.weight is ffn_up."""
    return tensor.split(".")[-2]


def zero_counts(tensors: dict[str, ReaderTensor]) -> dict[str, int]:
    """How many weights of each tensor are exactly zero once dequantized. Raises `CheckFailed` for NaN or infinity."""
    return {name: sum(zeros_in(name, chunk) for chunk in chunks(tensor)) for name, tensor in tensors.items()}


def zeros_in(name: str, weights: np.ndarray) -> int:
    if not np.isfinite(weights).all():
        raise CheckFailed(f"{name} has weights that are not finite; the model cannot be used, train it again")
    return weights.size - int(np.count_nonzero(weights))


def chunks(tensor: ReaderTensor) -> Iterator[np.ndarray]:
    """float32 (rows, columns), a few rows at a time."""
    columns = int(tensor.shape[0])  # GGUF's own order: the row length comes first
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])  # as bytes where quantized
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, len(rows), step):
        yield dequantize(rows[start : start + step], tensor.tensor_type)
