"""The Hugging Face Trainer with what it lacks here: a held-out loss over tokens, and no going on after a NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput

from pipeline import progress
from pipeline.collate import IGNORED
from pipeline.errors import CheckFailed

OVERFLOWS_IN_A_ROW = 20  # fp16 finds its loss scale by overflowing a few times; its factor of 2**16 halves each time


def callbacks(early_stopping: int, fp16: bool, tensorboard: Path) -> list[TrainerCallback]:
    chosen: list[TrainerCallback] = [
        StopAtNonFinite(fp16),
        TensorBoardCallback(SummaryWriter(str(tensorboard))),
    ]
    if early_stopping:
        chosen.append(EarlyStoppingCallback(early_stopping))
    if progress.wanted():
        chosen.append(Bar())
    return chosen


class QuoteTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, with a held-out loss over tokens."""

    def evaluation_loop(
        self, dataloader: Any, description: str, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """Mean loss of all tokens, as the ledger has it. The library averages the means of batches, in which a
        token of a short quote weighs more than one of a long quote, by an amount that hangs on the batch size."""
        model = self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # loss, tokens
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            predicted = int((inputs["labels"][:, 1:] != IGNORED).sum())
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = model(**inputs).loss
            total += torch.tensor([loss.item() * predicted, predicted])
        loss_sum, tokens = total.tolist()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / tokens}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))


class StopAtNonFinite(TrainerCallback):  # type: ignore[misc]
    """Training does not recover from a NaN: it would go on, and ship it."""

    def __init__(self, fp16: bool) -> None:
        self.fp16 = fp16
        self.overflows = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        for name, value in (logs or {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                if name == "grad_norm" and self.fp16 and self.overflows < OVERFLOWS_IN_A_ROW:
                    self.overflows += 1
                    continue
                raise CheckFailed(
                    f"{name} is {value} at step {state.global_step} of {state.max_steps}, so training cannot go on; "
                    f"try a lower train.learning_rate (now {args.learning_rate:g}), train.precision bf16 or fp32, "
                    f"or clipping (train.max_grad_norm, now {args.max_grad_norm:g})"
                )
            if name == "grad_norm":
                self.overflows = 0


class Bar(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bar, without its printing every logged line."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass
