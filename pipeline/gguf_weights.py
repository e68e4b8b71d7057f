"""A GGUF's tensors put into a model of transformers, and back into the file in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.activations import HEAD
from pipeline.errors import CheckFailed
from pipeline.gguf_names import (
    as_stored,
    gguf_name,
    is_transposed,
    matrix_names,
    name_map,
    rows_as_stored,
    rows_as_trained,
)
from pipeline.gguf_reader import TensorReader
from pipeline.kquants import KTYPES, KQuant, pack, unpack
from pipeline.matrices import block_matrices

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


@torch.no_grad()
def load_weights(model: PreTrainedModel, path: Path) -> None:
    """`model` with the weights of `path`, dequantized. Raises `CheckFailed` when a parameter has no tensor there."""
    for name, parameter, stored in stored_parameters(model, TensorReader(path)):
        parameter.copy_(read_weight(name, stored, model.config))


def read_weight(name: str, stored: ReaderTensor, config: PreTrainedConfig) -> Tensor:
    """The tensor of a parameter, dequantized, float32, shaped as transformers has it."""
    values = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
    rows = rows_as_trained(name, torch.from_numpy(values), config)
    return rows.T if is_transposed(name, config) else rows


def read_kquants(model: PreTrainedModel, path: Path) -> dict[str, KQuant]:
    """The block matrices that `path` keeps in a k-quant of ours, by module name, rows as transformers has them."""
    tensors = {tensor.name: tensor for tensor in TensorReader(path).tensors}
    found = {}
    for module, name in matrix_names(model.config, block_matrices(model)).items():
        kind = tensors[name].tensor_type.name
        if kind in KTYPES:
            data = rows_as_trained(module, np.asarray(tensors[name].data), model.config)
            found[module] = unpack(np.ascontiguousarray(data), kind)
    return found


def matrix_types(model: PreTrainedModel, path: Path) -> dict[str, str]:
    """What `path` stores each block matrix and the head as, by module name (the head's is `HEAD`)."""
    names = matrix_names(model.config, block_matrices(model)) | {HEAD: head_tensor(model)}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in TensorReader(path).tensors}
    return {module: kinds[name] for module, name in names.items()}


def read_matrices(model: PreTrainedModel, path: Path, modules: Sequence[str]) -> dict[str, Tensor]:
    """The named block matrices of `path`, dequantized, (out, in) float32, rows as transformers has them."""
    tensors = {tensor.name: tensor for tensor in TensorReader(path).tensors}
    found = {}
    for module, name in matrix_names(model.config, modules).items():
        values = np.array(dequantize(tensors[name].data, tensors[name].tensor_type), dtype=np.float32)
        found[module] = rows_as_trained(module, torch.from_numpy(values), model.config)
    return found


def head_tensor(model: PreTrainedModel) -> str:
    """The file's name of the output head: that of the token embedding where they are one."""
    return EMBEDDING if model.config.tie_word_embeddings else OUTPUT


def write_kquants(model: PreTrainedModel, path: Path, kquants: Mapping[str, KQuant]) -> None:
    """Over what `path` has for these matrices: bytes of the same type, so the file's layout stays as it is.

    Keys are names of block matrices, or `HEAD`.
    """
    config = model.config
    tensors = {tensor.name: tensor for tensor in TensorReader(path, "r+").tensors}
    names = matrix_names(config, (module for module in kquants if module != HEAD)) | {HEAD: head_tensor(model)}
    for module, kquant in kquants.items():
        stored = tensors[names[module]]
        data = rows_as_stored(module, pack(kquant), config)
        if stored.tensor_type.name != kquant.type or stored.data.shape != data.shape:
            raise CheckFailed(
                f"{stored.name} of {path.name} is {stored.tensor_type.name} of shape {stored.data.shape}, packed were "
                f"{kquant.type} bytes of shape {data.shape}; this is a bug"
            )
        stored.data[:] = data
        stored.data.flush()


def write_vectors(model: PreTrainedModel, path: Path) -> None:
    """What `path` keeps in F32 (norms, biases, positions), as `model` has it now."""
    for name, parameter, stored in stored_parameters(model, TensorReader(path, "r+")):
        if stored.tensor_type.name == "F32":
            rows = as_stored(name, parameter.detach().cpu(), model.config)
            stored.data[:] = rows.contiguous().numpy()
            stored.data.flush()


def freeze_rounded(model: PreTrainedModel, path: Path) -> None:
    """Leaves to training what `path` keeps in F32: positions that were added are F16, and could not be written back."""
    for _, parameter, stored in stored_parameters(model, TensorReader(path)):
        parameter.requires_grad_(stored.tensor_type.name == "F32")


def stored_parameters(model: PreTrainedModel, reader: TensorReader) -> Iterator[tuple[str, nn.Parameter, ReaderTensor]]:
    """Each parameter of `model` with its name and the file's tensor."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = name_map(model.config)
    for hf_name, parameter in model.named_parameters():
        name = gguf_name(names, hf_name)
        if name is None or name not in tensors:
            raise CheckFailed(f"the file has no tensor for {hf_name} among its {len(tensors)}; export it again")
        yield hf_name, parameter, tensors[name]
