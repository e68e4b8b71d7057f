"""GPT-2's learned table of positions, made longer than it was trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import ConfigError

LEARNED = ("gpt2",)  # the exported model types whose positions are a table; llama computes them (rotary)
LAST_ROWS = 16

Fill = Callable[[Tensor, int], Tensor]  # trained rows (N, C) and a number of rows to ones for the positions after


def steady(trained: Tensor, rows: int) -> Tensor:
    """The mean of the last 16 rows, at every new position: late in a text, and no telling where.

    The last row of all is left out: a model trained on windows as long as its table predicts nothing from it.
    """
    return trained[-LAST_ROWS - 1 : -1].mean(0, keepdim=True).expand(rows, -1)


def later_half(trained: Tensor, rows: int) -> Tensor:
    """The later half of the table, repeated: neighbours stay neighbours, but each row stands in several places."""
    return repeated(trained[len(trained) // 2 : -1], rows)


def most(trained: Tensor, rows: int) -> Tensor:
    """All but the first 32nd of the table, repeated: as `later_half`, with half as many doubles further apart.

    The first rows mark the beginning of a text, where heads that find nothing look; in its middle they would be a
    second beginning.
    """
    return repeated(trained[len(trained) // 32 : -1], rows)


def repeated(period: Tensor, rows: int) -> Tensor:
    return period[torch.arange(rows, device=period.device) % len(period)]


# Measured on a small trained GPT-2 cut to its 128 trained rows and extended to 256 and to 512: perplexity of the second
# half of each window, 147 at 128. steady 182 and 203, later_half 214 and 218, most 242 and 237; the last row alone 211
# and 224, the rows mirrored 214 and 225, the whole table again 246 and 241, zeros 251 and 258, the trend of the last 32
# rows continued 227 and 594. That model hardly looks at positions (185 at 128 with one row for all), so a fill that
# tells none suits it; one that finds neighbours by them needs the others. `extend` measures each on the model it has.
FILLS: dict[str, Fill] = {fill.__name__: fill for fill in (steady, later_half, most)}


def require_extendable(config: PreTrainedConfig, context: int) -> None:
    """Raises `ConfigError` where there is no table, or `context` does not make it longer."""
    positions = config.max_position_embeddings
    if config.model_type not in LEARNED:
        raise ConfigError(
            f"export.context {context} extends a learned table of positions, but the base model is a "
            f"{config.model_type}, whose {positions} positions are rotary, computed without a table; leave it out"
        )
    if context <= positions:
        what = "would shrink the table of" if context < positions else "adds nothing to"
        raise ConfigError(
            f"export.context {context} {what} the base model's {positions} positions; choose more, or leave it out"
        )


def extend_positions(model: PreTrainedModel, context: int, fill: Fill = steady) -> None:
    """Gives `model` `context` positions, in place; the rows it has stay bit by bit as they are.

    Raises `ConfigError` as `require_extendable` does.
    """
    require_extendable(model.config, context)
    trained = table_of(model).weight.data
    set_table(model, torch.cat([trained, fill(trained, context - len(trained))]))


def table_of(model: PreTrainedModel) -> nn.Embedding:
    table: nn.Embedding = model.transformer.wpe
    return table


def set_table(model: PreTrainedModel, rows: Tensor) -> None:
    """`rows` (T, C) as the table, and T in the config. Attention has no buffer of its own that would have to grow."""
    model.transformer.wpe = nn.Embedding(len(rows), rows.shape[1], _weight=rows)
    model.config.n_positions = len(rows)
    if hasattr(model.config, "n_ctx"):  # of configs written by an older transformers
        model.config.n_ctx = len(rows)
