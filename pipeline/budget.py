"""Tensor types chosen under a limit of the file's size, by what each was measured to cost.

A role (ffn_up, token_embd, …: the same matrix of every block) gets one type. The costs of the roles, each rounded
alone by what will round it in the file, but before adapting and finishing, are added up to that of a mix, as in
HAWQ-V3 (arXiv:2011.10680).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from pipeline.artifacts import Facts, GgufFile
from pipeline.calibrate import first_of
from pipeline.config.shrinking import UNQUANTIZED
from pipeline.errors import ConfigError
from pipeline.forecast import Choice, Forecast, foretell, stored_bytes
from pipeline.gguf_file import BLOCK_MATRIX, GgufContents, role_of
from pipeline.kept_zeros import KEEP_ZEROS
from pipeline.llama_cpp import LlamaCpp
from pipeline.sensitivity import FILE_TYPE, sensitivity

log = logging.getLogger(__name__)

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")  # from the smallest
NARROW_TYPES = ("Q4_0", "Q5_0", "Q8_0")  # for rows that are no multiple of 256
MEASURED_TOKENS = 2000


@dataclass(frozen=True)
class Role:
    """Tensors that get the same type, by name; shapes in GGUF's order, the row length first."""

    tensors: dict[str, tuple[int, ...]]
    types: tuple[str, ...]  # to choose from, from the smallest

    def size_as(self, kind: str) -> int:
        return sum(stored_bytes(shape, kind) for shape in self.tensors.values())


class Option(NamedTuple):
    size_bytes: int
    cost: float


class Mix(NamedTuple):
    size_bytes: int
    cost: float
    types: tuple[str, ...]  # in the order of the roles


def least(forecast: Forecast, file: str, max_bytes: int, setting: str = "quantize.max_bytes") -> Forecast:
    """What is certain of `file` before anything is measured: the smallest mix of types, where there is a budget.

    Without one (0) `forecast` itself. Raises `ConfigError` when the smallest is larger than what `setting` allows.
    """
    if not max_bytes:
        return forecast
    smallest = smallest_of(forecast)
    size = smallest.size_bytes
    if size > max_bytes:
        found = f"no mix of types makes {file} smaller than {size:,} bytes"
        if not roles_of(forecast):
            found = f"{file} will have {size:,} bytes and no types to choose"
        raise ConfigError(f"{found}, but {setting} allows {max_bytes:,}; set it to at least {size}")
    return smallest


def smallest_of(forecast: Forecast) -> Forecast:
    types = {tensor: role.types[0] for role in roles_of(forecast).values() for tensor in role.tensors}
    shapes = forecast.shapes
    change = sum(
        stored_bytes(shapes[tensor], kind) - stored_bytes(shapes[tensor], forecast.types[tensor])
        for tensor, kind in types.items()
    )
    return replace(
        forecast,
        size_bytes=forecast.size_bytes + change,
        types=forecast.types | types,
        fallbacks=tuple(fallback for fallback in forecast.fallbacks if fallback.tensor not in types),
    )


def roles_of(forecast: Forecast, *, keep_zeros: bool = False) -> dict[str, Role]:
    """What llama-quantize quantizes at all, by role. `keep_zeros`: block matrices get no type that loses zeros."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor, kind in forecast.types.items():
        if kind not in UNQUANTIZED:
            found.setdefault(role_of(tensor), {})[tensor] = forecast.shapes[tensor]
    return {role: Role(tensors, types_for(tensors, keep_zeros)) for role, tensors in sorted(found.items())}


def types_for(tensors: Mapping[str, Sequence[int]], keep_zeros: bool) -> tuple[str, ...]:
    types = TYPES if all(shape[0] % 256 == 0 for shape in tensors.values()) else NARROW_TYPES
    pruned = keep_zeros and any(BLOCK_MATRIX.fullmatch(tensor) for tensor in tensors)
    return tuple(kind for kind in types if not pruned or kind in KEEP_ZEROS)


def choose_types(
    f16: GgufFile,
    model: PreTrainedModel,
    tuned: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    max_bytes: int,
    choice: Choice,
    encode: Callable[[Path, str], object],
    *,
    keep_zeros: bool,
    tools: LlamaCpp,
    out: Path,
) -> tuple[Choice, Facts]:
    """`choice` with the types that cost least on `sequences` among all mixes whose file has at most `max_bytes`.

    `model`, `tuned`, `f16`, `encode` and `out` are as in `sensitivity`. `max_bytes` allows the smallest mix: see
    `least`.
    """
    forecast = foretell(GgufContents(f16.path), FILE_TYPE, tools, choice)
    roles = roles_of(forecast, keep_zeros=keep_zeros)
    measured = first_of([list(ids) for ids in sequences], MEASURED_TOKENS)
    tensors = {role: {kind: list(found.tensors) for kind in found.types} for role, found in roles.items()}
    kl = sensitivity(model, tuned, f16.path, measured, tensors, choice, encode, tools, out)
    options = {
        role: {kind: Option(found.size_as(kind), kl[role][kind]) for kind in found.types}
        for role, found in roles.items()
    }
    others = smallest_of(forecast).size_bytes - sum(found.size_as(found.types[0]) for found in roles.values())
    chosen = best_mix(options, max_bytes - others)
    log.info("quantize: within %d bytes the least KL is that of %s", max_bytes, chosen)
    facts: Facts = {
        "max_bytes": max_bytes,
        "tokens": sum(len(ids) - 1 for ids in measured),
        "kl": kl,
        "types": chosen,
        "kl_sum": sum(kl[role][kind] for role, kind in chosen.items()),
    }
    types = {tensor: kind for role, kind in chosen.items() for tensor in roles[role].tensors}
    return Choice(choice.importance, types), facts


def best_mix(options: Mapping[str, Mapping[str, Option]], max_bytes: int) -> dict[str, str]:
    """Role to type, of the least summed cost that fits `max_bytes`; of mixes that cost the same, the smallest.

    Exact: role by role, only mixes are kept that no smaller one undercuts. `max_bytes` allows the smallest mix.
    """
    mixes = [Mix(0, 0.0, ())]
    left = sum(smallest_option(types) for types in options.values())
    for types in options.values():
        left -= smallest_option(types)
        grown = sorted(
            Mix(mix.size_bytes + option.size_bytes, mix.cost + option.cost, (*mix.types, kind))
            for mix in mixes
            for kind, option in types.items()
        )
        mixes = list(undercut(mix for mix in grown if mix.size_bytes + left <= max_bytes))
    return dict(zip(options, mixes[-1].types, strict=True))


def smallest_option(types: Mapping[str, Option]) -> int:
    return min(option.size_bytes for option in types.values())


def undercut(mixes: Iterator[Mix]) -> Iterator[Mix]:
    """Of mixes from the smallest on, those that cost less than all before them."""
    cost = float("inf")
    for mix in mixes:
        if mix.cost < cost:
            cost = mix.cost
            yield mix
