"""More positions than the model was trained with, for `--export.context`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.artifacts import Calibration, Checkpoint, Facts
from pipeline.calibrate import load_calibration
from pipeline.checkpoints import Checkpoints
from pipeline.config import ExportConfig
from pipeline.course import Best, Course, resumed, write
from pipeline.device import arithmetic_of
from pipeline.distill import arithmetic
from pipeline.errors import CheckFailed
from pipeline.long_text import Sequences, batches, joined, window
from pipeline.positions import FILLS, extend_positions, require_extendable, set_table, table_of
from pipeline.progress import bar

log = logging.getLogger(__name__)

CHECKED_TOKENS = 512  # of validation text, at the end of the checked windows
CHECKED_PLACES = (0.5, 1.0)  # where such a window ends: halfway through the new positions, and at the last
CHUNK = 512  # logits of this many tokens are in memory at once: 103 MB for GPT-2
KNOT = 64  # positions
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Check:
    ids: list[int]
    tokens: int  # scored, at the end


def extend(
    checkpoint: Checkpoint,
    calibration: Calibration,
    cfg: ExportConfig,
    *,
    device: str,
    seed: int,
    out: Path,
    checkpoints: Checkpoints | None = None,
) -> Checkpoint:
    """`checkpoint` with `cfg.context` positions in `out`; all it had stays bit by bit as it is.

    The new rows are filled in the way that predicts the calibration's validation text best, then trained for
    `cfg.context_steps` steps, from the newest of `checkpoints` on if there is one, on a CPU to the same bits; what they
    learned is kept if that text is predicted better by it. Raises `ConfigError`
    for a model without a learned table, or with as many positions already; `CheckFailed` for a loss that is not finite.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    require_extendable(model.config, cfg.context)
    model = model.to(device).eval()
    positions = model.config.max_position_embeddings
    train, validation = (load_calibration(calibration, split) for split in ("train", "validation"))
    checks = check_windows(train, validation, positions, cfg.context, seed)
    facts = {"positions": positions, "context": cfg.context} | choose_fill(model, cfg.context, checks)
    if cfg.context_steps:
        facts |= train_rows(model, positions, train, checks, cfg.context_steps, seed, checkpoints)
    log.info(
        "extend: %d to %d positions, filled by %s, loss %.3f", positions, cfg.context, facts["fill"], facts["loss"]
    )
    model.cpu().save_pretrained(out)
    checkpoint.copy_tokenizer(out)
    return Checkpoint.of(out, facts)


def with_context(checkpoint: Path, context: int, out: Path) -> Path:
    """The checkpoint itself if it has `context` positions or 0 are asked for, else a copy in `out` that has them.

    The copy is of the right size, but not measured or trained as `extend` does it.
    """
    if not context or AutoConfig.from_pretrained(checkpoint).max_position_embeddings == context:
        return checkpoint
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    extend_positions(model, context)
    model.save_pretrained(out)
    Checkpoint(checkpoint, "").copy_tokenizer(out)
    return out


def check_windows(train: Sequences, validation: Sequences, positions: int, context: int, seed: int) -> list[Check]:
    """Validation text behind training text, the same text ending at each of two places among the new positions."""
    added = context - positions
    most = max(1, min(CHECKED_TOKENS, added // 2))
    before = long_enough(train, context, seed)
    return [
        Check(window(before, text, positions + round(place * added)), sum(len(ids) - 1 for ids in text))
        for text in batches(validation, most)[: CHECKED_TOKENS // most]
        for place in CHECKED_PLACES
    ]


def long_enough(sequences: Sequences, length: int, seed: int) -> list[int]:
    """`sequences` joined, over and over in new orders if need be, to at least `length` tokens."""
    text: list[int] = []
    while len(text) < length:
        text += joined(sequences, seed)
        seed += 1
    return text


def choose_fill(model: PreTrainedModel, context: int, checks: Sequence[Check]) -> Facts:
    """Extends `model` in place in the way with the lowest loss, and says what each way gives, in nats a token."""
    trained = table_of(model).weight.data
    losses: dict[str, float] = {}
    tables: dict[str, Tensor] = {}
    for name, fill in FILLS.items():
        tables[name] = torch.cat([trained, fill(trained, context - len(trained))])
        set_table(model, tables[name])
        losses[name] = loss_of(model, checks)
    best = min(losses, key=losses.__getitem__)
    set_table(model, tables[best])
    return {"fill": best, "loss_by_fill": losses, "loss": losses[best]}


@torch.inference_mode()
def loss_of(model: PreTrainedModel, checks: Sequence[Check]) -> float:
    total = sum(float(summed_loss(model, check.ids, len(check.ids) - check.tokens)) for check in checks)
    loss = total / sum(check.tokens for check in checks)
    if not math.isfinite(loss):
        raise CheckFailed(f"the loss behind {len(checks[0].ids)} tokens is {loss}; the training went wrong")
    return loss


def summed_loss(model: PreTrainedModel, ids: Sequence[int], start: int) -> Tensor:
    """Nats of the tokens from `start` on, summed. Logits are made, and made again for gradients, chunk by chunk."""
    tokens = torch.tensor([ids], device=model.device)
    head = model.get_output_embeddings()

    def nats(states: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(head(states).float(), targets, reduction="sum")

    with arithmetic(model, arithmetic_of("auto", model.device.type).name):
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0, start - 1 : -1]
        pairs = zip(torch.split(hidden, CHUNK), torch.split(tokens[0, start:], CHUNK), strict=True)
        parts: list[Tensor] = [recomputed(nats, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(parts).sum()


def train_rows(
    model: PreTrainedModel,
    positions: int,
    train: Sequences,
    checks: Sequence[Check],
    steps: int,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> Facts:
    """Moves the new rows of the table, one text of the whole context a step; undone if it did not help.

    Not each row by itself: a text shows it once, and a few texts teach it mostly noise. What is added to the rows is
    one vector every `KNOT` positions, and in between on the straight line from one to the next, because tables that
    were trained are smooth too.
    """
    rows = NewRows(table_of(model).weight, positions)
    best = Best([rows.knots], math.inf)
    optimizer = torch.optim.AdamW([rows.knots], lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    course = resumed(checkpoints, best, optimizer, schedule, "extend")
    if course is None:
        course, best.loss = Course(), loss_of(model, checks)
    else:
        rows.lay()
    before, loss_before = course.step, best.loss
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is rows.table)
    with little_memory(model):
        for step in bar(range(before + 1, steps + 1), "extend", steps - before):
            course.losses.append(backward(model, positions, train, len(rows.table), seed + step - 1))
            require_finite(course.losses[-1], step, steps)
            rows.gather()
            optimizer.step()
            schedule.step()
            rows.lay()
            course.step = step
            if checkpoints and step < steps and checkpoints.due(step):
                checkpoints.save(step, lambda folder: write(folder, course, best, optimizer, schedule))
    # of the checkpoint it went on from; 0: from the start
    facts: Facts = {"steps": steps, "resumed": before, "loss_history": course.losses}
    return facts | keep_if_better(rows, loss_before, loss_of(model, checks))


def require_finite(loss: float, step: int, steps: int) -> None:
    if not math.isfinite(loss):
        raise CheckFailed(
            f"extend: the loss is {loss} at step {step} of {steps}; train again, or set export.context_steps to 0"
        )


def keep_if_better(rows: NewRows, before: float, after: float) -> Facts:
    """Takes back what the rows learned unless the loss on the checked text fell, and says how it moved."""
    kept = after < before
    if not kept:
        rows.undo()
    return {"kept": kept, "loss_before": before, "loss_after": after, "loss": min(after, before)}


class NewRows:
    """The rows of `table` from `positions` on: what they were filled with, and `knots`, which are trained."""

    def __init__(self, table: Tensor, positions: int) -> None:
        self.table, self.positions = table, positions
        self.filled = table.detach()[positions:].clone()  # (R, C)
        self.shares = hats(len(self.filled), KNOT).to(table.device)  # (R, K)
        self.knots = nn.Parameter(torch.zeros(self.shares.shape[1], table.shape[1], device=table.device))  # (K, C)

    def lay(self) -> None:
        """The knots as they are now show in the table."""
        self.table.data[self.positions :] = self.filled + self.shares @ self.knots.data

    def gather(self) -> None:
        """The table's gradient becomes the knots'."""
        self.knots.grad = self.shares.T @ torch.as_tensor(self.table.grad)[self.positions :]
        self.table.grad = None

    def undo(self) -> None:
        self.table.data[self.positions :] = self.filled


def backward(model: PreTrainedModel, positions: int, train: Sequences, context: int, seed: int) -> float:
    """Nats a token at the new positions of one text, whose gradient is then in the model."""
    ids = [train[0][0], *long_enough(train, context, seed)][:context]
    loss = summed_loss(model, ids, positions) / (context - positions)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def hats(rows: int, every: int) -> Tensor:
    """(rows, K): how much of each of K evenly spaced vectors a row gets, on straight lines between them."""
    count = max(2, rows // every + 1)
    place = torch.linspace(0, count - 1, rows)
    return (1 - (place[:, None] - torch.arange(count)).abs()).clamp(min=0)


@contextmanager
def little_memory(model: PreTrainedModel) -> Iterator[None]:
    """A third more time for a fraction of the memory: of 4,096 tokens, GPT-2's activations would be over 5 GB."""
    dropped = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    model.activation_checkpointing_enable()
    model.train()  # else it keeps the activations; so dropout has to be turned off by hand
    for module in dropped:
        module.p = 0.0
    yield
    for module, p in dropped.items():
        module.p = p
    model.eval()
    model.activation_checkpointing_disable()
