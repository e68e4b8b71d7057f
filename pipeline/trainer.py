"""The Hugging Face Trainer with what it lacks here: a held-out loss over tokens, no going on after a NaN, and
checkpoints that a kill cannot tear, from which training ends in the same weights as if it had not been killed."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
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
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput

from pipeline import progress, sharding, signals
from pipeline.checkpoints import Checkpoints, step_of
from pipeline.collate import IGNORED
from pipeline.errors import CheckFailed
from pipeline.team import together
from pipeline.team.worker import KeptElsewhere

log = logging.getLogger(__name__)

# In a checkpoint. Each has its place: PEFT takes a folder of weights inside the Trainer's own for another adapter.
STATE = "trainer"
BEST = "best"
CURVE = "curve.json"  # loss that has not been logged yet
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
    """The Trainer, with a held-out loss over tokens and with `checkpoints`."""

    def __init__(self, *args: Any, checkpoints: Checkpoints | KeptElsewhere | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoints = checkpoints
        self.checkpoint_wanted = False
        self.found: Path | None = None  # the checkpoint that training went on from
        self.resumed = 0  # its step
        self.tokens_before = 0
        self.random_states: list[bytes] = []  # of every process, by rank
        self.unlogged_loss = 0.0
        self.whole: tuple[sharding.State, sharding.State] | None = None  # model and optimizer, where they are in shares
        if checkpoints:
            self.add_callback(Keeper(self, checkpoints))

    def train_on(self, found: Path | None) -> None:
        """`train()`, from the checkpoint `found` if there is one."""
        if found is None:
            self.train()
            return
        self.found = found
        self.resumed = step_of(found)
        log.info("finetune: goes on from its checkpoint at step %d", self.resumed)
        self.train(resume_from_checkpoint=str(found / STATE))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The library's hook for both: the best weights so far, which it keeps itself, and our checkpoints."""
        if self.state.best_global_step == self.state.global_step:
            super()._save_checkpoint(model, trial)
        if self.checkpoints and self.checkpoint_wanted and not self.control.should_training_stop:
            self.store_flos()  # this and what follows is every process's work; the rest is the first one's
            self.unlogged_loss = together.mean(self._tr_loss.item())
            self.random_states = together.collected(self.random_state())
            if self.is_fsdp_enabled:
                self.whole = sharding.whole_model(self.model), sharding.whole_optimizer(self.model, self.optimizer)
            self.checkpoints.save(self.state.global_step, self.write_checkpoint)
            self.checkpoint_wanted, self.whole = False, None

    def write_checkpoint(self, folder: Path) -> None:
        """What `train(resume_from_checkpoint=…)` reads, the best weights so far, and where the loss curve is."""
        state = folder / STATE
        if self.whole:
            self._save(str(state), state_dict=self.whole[0])
            torch.save(self.whole[1], state / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), state / SCHEDULER_NAME)
        else:
            self.save_model(str(state), _internal_call=True)
            self._save_optimizer_and_scheduler(str(state))
        (state / TRAINING_ARGS_NAME).unlink()  # a pickle that is never read
        self._save_scaler(str(state))
        for rank, data in enumerate(self.random_states):
            (state / random_file(rank)).write_bytes(data)
        stateful = [c for c in (*self.callback_handler.callbacks, self.control) if isinstance(c, ExportableState)]
        self.state.stateful_callbacks = {type(callback).__name__: callback.state() for callback in stateful}
        self.state.save_to_json(str(state / TRAINER_STATE_NAME))
        curve = {"loss": self.unlogged_loss, "step": self._globalstep_last_logged}
        (folder / CURVE).write_text(json.dumps(curve))
        if self.state.best_model_checkpoint:
            (folder / BEST).mkdir()
            for path in Path(self.state.best_model_checkpoint).glob("*.safetensors*"):
                shutil.copyfile(path, folder / BEST / path.name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The library's hook; its own for a model in shares reads pickles."""
        if self.is_fsdp_enabled:
            sharding.put_back_model(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As above."""
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint:
            sharding.put_back_optimizer(self.model, self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def random_state(self) -> bytes:
        """What `train` restores, of this process."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            return (Path(folder) / random_file(together.rank())).read_bytes()

    def read_checkpoint(self, folder: Path) -> None:
        """What `train` does not restore by itself; to be called when it has begun."""
        curve = json.loads((folder / CURVE).read_text())
        self._tr_loss += curve["loss"]
        self._globalstep_last_logged = curve["step"]
        self.tokens_before = self.state.num_input_tokens_seen
        if (folder / BEST).is_dir() and together.rank() == 0:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            shutil.copytree(folder / BEST, best)
            self.state.best_model_checkpoint = str(best)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Whole, in every process: accelerate would deal out examples, and some twice, to give all equally many."""
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        return DataLoader(dataset, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def evaluation_loop(
        self, dataloader: Any, description: str, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """Mean loss of all tokens, as the ledger has it. The library averages the means of batches, in which a
        token of a short quote weighs more than one of a long quote, by an amount that hangs on the batch size."""
        model = self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # loss, tokens
        for inputs, counts in dealt(dataloader, together.rank(), together.size()):
            inputs = self._prepare_inputs(inputs)
            predicted = int((inputs["labels"][:, 1:] != IGNORED).sum())
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = model(**inputs).loss
            if counts:
                total += torch.tensor([loss.item() * predicted, predicted])
        loss_sum, tokens = together.summed(total).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / tokens}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))


def dealt(batches: Iterable[Any], rank: int, size: int) -> Iterator[tuple[Any, bool]]:
    """Every `size`-th batch, and whether it counts: all processes compute equally often, or those that have a share of
    the model would be waited for for ever, so at the end some see a batch again."""
    number = 0
    for number, batch in enumerate(batches, 1):
        if (number - 1) % size == rank:
            yield batch, True
    if number % size and rank >= number % size:
        yield batch, False


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


class Keeper(TrainerCallback):  # type: ignore[misc]
    """Has a checkpoint written when one is due."""

    def __init__(self, trainer: QuoteTrainer, checkpoints: Checkpoints | KeptElsewhere) -> None:
        self.trainer, self.checkpoints = trainer, checkpoints

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.trainer.found:
            self.trainer.read_checkpoint(self.trainer.found)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == state.max_steps:
            return  # the result follows at once
        asked = signals.is_stopping() or together.stop_asked.is_set()
        due, wanted, stopping = together.any_of(self.checkpoints.due(state.global_step), self.checkpoints.wanted, asked)
        if stopping:
            signals.heard_of()
        if due or (stopping and wanted):
            self.trainer.checkpoint_wanted = True
        # At the end of an epoch the hold-out is still to be scored. A checkpoint from before that would go on with the
        # next epoch, and neither the curve nor the choice of the best epoch would know of this one.
        if self.trainer.checkpoint_wanted and not float(state.epoch).is_integer():
            control.should_save = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.checkpoint_wanted:
            control.should_save = True


class Bar(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bar, without its printing every logged line."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass


def random_file(rank: int) -> str:
    """The Trainer's name for a process's random state."""
    return "rng_state.pth" if together.size() == 1 else f"rng_state_{rank}.pth"
