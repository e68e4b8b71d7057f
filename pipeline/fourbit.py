"""A checkpoint loaded in 4 bits: NF4 with double quantization (QLoRA, arXiv:2305.14314), on a GPU or a CPU."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pipeline.artifacts import Facts
from pipeline.errors import CheckFailed

BYTES_FP32 = 4


def load_nf4(checkpoint: Path, device: str) -> PreTrainedModel:
    """The model with its block matrices in NF4; embeddings, norms and biases stay fp32.

    Raises `CheckFailed` when not one matrix was packed.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(device),
        ),
        dtype=torch.float32,
        device_map={"": device},
    )
    packed = packed_matrices(model)
    for module in packed.values():
        # Where the CPU has AVX512-BF16, bitsandbytes would repack the weights at the first forward in eval mode
        # and then compute in bf16: another result than asked for, and nothing else can read the weights after.
        module.support_avx512bf16_for_cpu = False
    if not packed:
        raise CheckFailed(
            f"bitsandbytes packed no matrix of {type(model).__name__} into 4 bits; set fourbit.enabled to false, or "
            "use a model with linear layers in its blocks"
        )
    return model.eval()


def compute_dtype(device: str) -> torch.dtype:
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def packed_matrices(model: torch.nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def dequantized(module: bnb.nn.Linear4bit) -> torch.Tensor:
    """The weight that the 4-bit layer computes with, (out, in) in fp32."""
    weight = module.weight
    dense: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return dense.float()


def nf4_facts(model: PreTrainedModel) -> Facts:
    """Bytes of the weights as they lie in memory, and what they would be in fp32."""
    weights = {id(weight): weight for weight in model.parameters()}.values()  # tied ones once
    numbers = sum(
        state.shape.numel() if (state := getattr(weight, "quant_state", None)) else weight.numel() for weight in weights
    )
    return {
        "matrices": len(packed_matrices(model)),
        "parameters": numbers,
        "memory_bytes": model.get_memory_footprint(),
        "fp32_bytes": BYTES_FP32 * numbers,
    }
