"""LoRA (arXiv:2106.09685) and QLoRA (arXiv:2305.14314): adapters on every block matrix, and the way back to one
dense model, for the stages after know nothing of adapters."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.config import TrainConfig
from pipeline.fourbit import dequantized
from pipeline.matrices import block_matrices, weight_of


def with_adapters(model: PreTrainedModel, cfg: TrainConfig) -> PeftModel:
    """`model` frozen, with a trainable low-rank adapter beside each block matrix. It changes nothing yet."""
    matrices = block_matrices(model)
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=list(matrices),
        # GPT-2's Conv1D keeps (in, out); packed in 4 bits, the same matrix is a Linear4bit and (out, in).
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in matrices.values()),
    )
    if cfg.gradient_checkpointing:
        model.enable_input_require_grads()  # or no gradient passes the frozen embedding into the blocks
    return get_peft_model(model, adapters)


@torch.no_grad()
def merged(adapted: PeftModel, base: PreTrainedModel) -> PreTrainedModel:
    """`base`, the dense fp32 model it started from, changed in place to compute what `adapted` does.

    QLoRA trained its adapters beside the NF4 weights, rounding errors included, so they are added to those as
    they dequantize. Added to the original weights, or packed into 4 bits again as PEFT's own merge does, it would
    be a model that was never trained.
    """
    for name, module in block_matrices(base).items():
        layer = adapted.get_base_model().get_submodule(name)
        weight = weight_of(module)  # (out, in)
        if isinstance(layer.base_layer, Linear4bit):
            weight.copy_(dequantized(layer.base_layer))
        weight += delta(layer).to(weight.device)
    return base


def delta(layer: LoraLayer) -> Tensor:
    """scaling * B A, (out, in) in fp32."""
    (adapter,) = layer.active_adapters
    up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight  # (out, rank), (rank, in)
    product: Tensor = up.float() @ down.float()
    return product * float(layer.scaling[adapter])
