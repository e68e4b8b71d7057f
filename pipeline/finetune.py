"""Base model to tuned model: the Hugging Face Trainer, run under accelerate, with guards on what it reports."""

from __future__ import annotations

import gc
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainingArguments
from transformers import EarlyStoppingCallback as Patience

from pipeline import curves, sharding
from pipeline.adapters import merged, with_adapters
from pipeline.artifacts import Checkpoint, Facts, TokenDataset
from pipeline.checkpoints import Checkpoints
from pipeline.collate import collate
from pipeline.config import TrainConfig
from pipeline.device import choose_precision
from pipeline.errors import CheckFailed, ConfigError
from pipeline.fourbit import load_nf4
from pipeline.team import Team, together
from pipeline.team.lesson import Keeping, Lesson
from pipeline.team.worker import KeptElsewhere
from pipeline.tokens import load_split
from pipeline.trainer import QuoteTrainer, callbacks

log = logging.getLogger(__name__)

LOGGED_STEPS = 200  # points of the loss curve at most; each costs a wait for the GPU and a line in metrics.json


def finetune(
    base: Checkpoint,
    tokens: TokenDataset,
    cfg: TrainConfig,
    *,
    device: str,
    seed: int,
    out: Path,
    team: Team | None = None,
    checkpoints: Checkpoints | None = None,
) -> Checkpoint:
    """`base` trained on the train split, whole and in fp32, in `out`/model; TensorBoard logs in `out`/tensorboard.

    Goes on from the newest of `checkpoints`; on a CPU the result is to the bit that of a training which never stopped.
    Weights and optimizer state are fp32 whatever `cfg.precision`. LoRA and QLoRA are merged. The `team` trains with
    several processes if it has them: the same result but for rounding, and for the quotes that fill an epoch's last
    step up to whole batches for all. Raises `CheckFailed` (code 70)
    when the loss is not finite, `ConfigError` when one example does not fit into the GPU.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    processes, machines = (team.processes(cfg, gpus), team.cfg.count) if team else (1, 1)
    share = cfg.batch_size * cfg.accumulation // (processes * machines)
    batch_size = largest_divisor(share, cfg.batch_size)
    while True:
        try:
            if team and processes * machines > 1:
                keeping = Keeping.of(checkpoints) if checkpoints and checkpoints.wanted else None
                lesson = Lesson(base, tokens, cfg, batch_size, device, seed, out, keeping)
                facts = team.train(lesson, processes, checkpoints.require_wanted if checkpoints else lambda: None)
            else:
                found = checkpoints.newest() if checkpoints else None
                facts = train_here(base, tokens, cfg, batch_size, device, seed, out, checkpoints, found)
            break
        except torch.cuda.OutOfMemoryError as e:
            batch_size = smaller_batch(batch_size, e)
        gc.collect()  # outside the except block, whose traceback keeps the tensors alive
        torch.cuda.empty_cache()
    return Checkpoint.of(out / "model", facts)


def train_here(
    base: Checkpoint,
    tokens: TokenDataset,
    cfg: TrainConfig,
    batch_size: int,
    device: str,
    seed: int,
    out: Path,
    checkpoints: Checkpoints | KeptElsewhere | None,
    found: Path | None,
) -> Facts:
    """This process's part of the training, which is all of it unless it is one of several; the first writes the model
    to `out`. Goes on from the checkpoint `found`. Returns what was measured."""
    for leftover in ("trainer", curves.FOLDER):
        shutil.rmtree(out / leftover, ignore_errors=True)
    splits = {split: load_split(tokens, split) for split in ("train", "validation", "holdout")}
    trainer, model = train(base, splits, cfg, batch_size, device, seed, out, checkpoints, found)
    facts = measured(trainer, splits, cfg, device, batch_size) | {"total_parameters": model.num_parameters()}
    shutil.rmtree(out / "trainer", ignore_errors=True)
    if together.rank() == 0:
        model.save_pretrained(out / "model")
        base.copy_tokenizer(out / "model")
    return facts


def largest_divisor(of: int, at_most: int) -> int:
    return max(size for size in range(1, min(of, at_most) + 1) if of % size == 0)


def smaller_batch(batch_size: int, error: torch.cuda.OutOfMemoryError) -> int:
    """The next smaller divisor, so that batch times accumulation, and with it the recipe, stays the same."""
    if batch_size == 1:
        raise ConfigError(
            "the GPU's memory does not hold one example a step; set train.gradient_checkpointing true, "
            "tokens.max_length lower or train.method qlora, or take a larger GPU"
        ) from error
    smaller = largest_divisor(batch_size, batch_size - 1)
    log.warning("finetune: out of GPU memory with %d examples a batch, trying %d", batch_size, smaller)
    return smaller


def train(
    base: Checkpoint,
    splits: dict[str, Dataset],
    cfg: TrainConfig,
    batch_size: int,
    device: str,
    seed: int,
    out: Path,
    checkpoints: Checkpoints | KeptElsewhere | None,
    found: Path | None,
) -> tuple[QuoteTrainer, PreTrainedModel]:
    """The finished trainer and the dense model."""
    torch.manual_seed(seed)  # adapters are drawn before the Trainer sets its seed
    model = load(base, cfg, device)
    use_cache = model.config.use_cache
    arguments = trainer_arguments(cfg, batch_size, len(splits["train"]), device, seed, out)
    trainer = QuoteTrainer(
        model=with_adapters(model, cfg) if cfg.method != "full" else model,
        args=arguments,
        data_collator=collate,
        train_dataset=splits["train"],
        eval_dataset={name: splits[name] for name in ("validation", "holdout") if len(splits[name])},
        callbacks=callbacks(cfg.early_stopping, arguments.fp16, out / curves.FOLDER),
        checkpoints=checkpoints,
    )
    trainer.remove_callback(PrinterCallback)  # it prints every logged line to standard output
    trainer.train_on(found)
    require_finished(trainer, cfg)
    model.config.use_cache = use_cache  # the Trainer turns it off, and it would be saved
    return trainer, dense_of(trainer, base)


def dense_of(trainer: QuoteTrainer, base: Checkpoint) -> PreTrainedModel:
    """What was trained, whole, on the CPU; of a model in shares only in the first process."""
    if isinstance(trainer.model, PeftModel):
        return merged(trainer.model, load_dense(base))
    if not trainer.is_fsdp_enabled:
        return trainer.model.cpu()
    state, dense = sharding.whole_model(trainer.model), load_dense(base)
    if together.rank() == 0:
        dense.load_state_dict(state)
    return dense


def load(base: Checkpoint, cfg: TrainConfig, device: str) -> PreTrainedModel:
    return load_nf4(base.path, device).train() if cfg.method == "qlora" else load_dense(base)


def load_dense(base: Checkpoint) -> PreTrainedModel:
    """In fp32: with fp16 weights, mixed precision has no exact gradients to scale."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    return model


def trainer_arguments(
    cfg: TrainConfig, batch_size: int, examples: int, device: str, seed: int, out: Path
) -> TrainingArguments:
    accumulation = cfg.accumulation * cfg.batch_size // batch_size // together.size()
    precision = choose_precision(cfg.precision, device).name
    steps = optimizer_steps(examples, cfg)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps or -1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2 * batch_size,  # no gradients, so twice as many fit
        gradient_accumulation_steps=accumulation,
        learning_rate=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        warmup_steps=math.ceil(cfg.warmup_ratio * steps),
        lr_scheduler_type=cfg.scheduler,
        max_grad_norm=cfg.max_grad_norm,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        activation_checkpointing=cfg.gradient_checkpointing,
        use_cpu=device == "cpu",
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch" if cfg.select_best else "no",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=cfg.select_best,
        restore_callback_states_from_checkpoint=True,  # how many epochs early stopping has waited
        metric_for_best_model="validation_loss" if cfg.select_best or cfg.early_stopping else None,
        greater_is_better=False,
        logging_steps=math.ceil(steps / LOGGED_STEPS),
        logging_nan_inf_filter=False,  # the default hides a NaN loss behind the mean of the losses before it
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,  # the collator takes what it needs
        label_names=["labels"],  # not found by itself behind a PEFT wrapper
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,  # there are none, and looking for them takes time
        **sharding.arguments(cfg.sharding),
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else nn.DataParallel on every GPU in sight; several need a launcher
    return arguments


def optimizer_steps(examples: int, cfg: TrainConfig) -> int:
    """As the Trainer counts them: a last, smaller group of batches is a step too."""
    an_epoch = math.ceil(math.ceil(examples / cfg.batch_size) / cfg.accumulation)
    return cfg.max_steps or math.ceil(cfg.epochs * an_epoch)


def require_finished(trainer: QuoteTrainer, cfg: TrainConfig) -> None:
    """`train()` also returns normally when a callback stopped it."""
    done, planned = trainer.state.global_step, trainer.state.max_steps
    waited = [c.early_stopping_patience_counter for c in trainer.callback_handler.callbacks if isinstance(c, Patience)]
    if done < planned and not (cfg.early_stopping and max(waited) >= cfg.early_stopping):
        raise CheckFailed(f"training ended at step {done} of {planned} without a reason; start it again")


def measured(
    trainer: QuoteTrainer, splits: dict[str, Dataset], cfg: TrainConfig, device: str, batch_size: int
) -> Facts:
    history = trainer.state.log_history
    parameters = list(trainer.model.parameters())
    precision = choose_precision(cfg.precision, device)
    return {
        "method": cfg.method,
        "precision": precision.name,
        "precision_why": precision.why,
        "examples": len(splits["train"]),
        "batch_size": batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
        "processes": together.size(),
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "epochs": trainer.state.epoch,
        "best_step": trainer.state.best_global_step if cfg.select_best else None,
        "trainable_parameters": sum(weight.numel() for weight in parameters if weight.requires_grad),
        "tokens_per_second": speed(
            [entry for entry in history if entry["step"] > trainer.resumed],
            trainer.state.num_input_tokens_seen - trainer.tokens_before,
        ),
        "gpu": torch.cuda.get_device_name(0) if device == "cuda" else None,
        "resumed": trainer.resumed,  # step of the checkpoint it went on from; 0: from the start
        "loss_history": curve(history, "loss"),
        "heldout_loss": curve(history, "eval_holdout_loss"),
        "validation_loss": curve(history, "eval_validation_loss"),
    }


def curve(history: list[dict[str, Any]], loss: str) -> list[Facts]:
    return [
        {"step": entry["step"], "epoch": entry["epoch"], "loss": entry[loss]}
        | ({"learning_rate": entry["learning_rate"]} if "learning_rate" in entry else {})
        for entry in history
        if loss in entry
    ]


def speed(history: list[dict[str, Any]], tokens: int) -> float:
    """Tokens trained on a second, without the time that the held-out quotes took."""
    times = {"train_runtime": 1, "eval_validation_runtime": -1, "eval_holdout_runtime": -1}
    seconds: float = sum(sign * entry.get(name, 0.0) for entry in history for name, sign in times.items())
    return tokens / seconds
