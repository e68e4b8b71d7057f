"""A model folder from outside, looked through before transformers loads it: nothing in it may be larger than it says,
lie elsewhere, or make the loader take more memory than its own files do."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import DataError
from pipeline.foreign_text import printable
from pipeline.safetensors_file import tensors_of

ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
LARGEST_CONFIG = 1024 * 1024  # bytes
LARGEST_TEXT = 128 * 1024 * 1024  # bytes of a tokenizer or an index; that of a vocabulary of 256,000 has 33 MB
FILLED_IN = 2  # transformers makes up weights that are missing: a model may have at most so many times its files'


def check_folder(folder: Path) -> None:
    """Raises `DataError`."""
    if (folder / ADAPTER).exists():  # transformers would load the model that it names, from a hub
        raise DataError(f"{ADAPTER} names another model to load; merge the adapter into its model, or remove it")
    for path in folder.glob("*.json"):
        limit = LARGEST_CONFIG if path.name in ("config.json", "generation_config.json") else LARGEST_TEXT
        check_size(path, limit)
    for path in folder.glob("*.txt"):
        check_size(path, LARGEST_TEXT)
    check_index(folder)
    elements = [tensor.elements for path in folder.glob("model*.safetensors") for tensor in tensors_of(path).values()]
    check_shape(folder, len(elements), sum(elements))


def check_size(path: Path, limit: int) -> None:
    if (size := path.stat().st_size) > limit:
        raise DataError(f"{path.name} has {size} bytes; needed at most {limit}")


def check_index(folder: Path) -> None:
    """The index names the files that the loader opens: those of this folder only."""
    if not (folder / INDEX).exists():
        return
    files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    here = {path.name for path in folder.glob("model*.safetensors")}
    for file in set(files) - here:
        raise DataError(f"{INDEX} names {printable(file, 200)}, which is no model*.safetensors of its folder")


def check_shape(folder: Path, tensors: int, elements: int) -> None:
    """config.json against what the files hold, on a model without memory."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not 1 <= config.num_hidden_layers <= tensors:
        raise DataError(f"config.json has {config.num_hidden_layers} layers, but the files only {tensors} tensors")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    described = sum(weight.numel() for weight in model.parameters())
    if described > FILLED_IN * elements:
        raise DataError(f"config.json describes a model of {described} weights, but the files hold only {elements}")
