"""The file types that llama-quantize makes: one row a type, smallest first."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.errors import ConfigError


class QuantType(NamedTuple):
    file_type: int  # general.file_type in the GGUF: llama.h's LLAMA_FTYPE_MOSTLY_*
    needs_importance: bool = False  # llama-quantize refuses it without an importance matrix


QUANT_TYPES = {
    "IQ1_S": QuantType(24, needs_importance=True),
    "IQ1_M": QuantType(31, needs_importance=True),
    "TQ1_0": QuantType(36),
    "IQ2_XXS": QuantType(19, needs_importance=True),
    "TQ2_0": QuantType(37),
    "IQ2_XS": QuantType(20, needs_importance=True),
    "IQ2_S": QuantType(28, needs_importance=True),
    "IQ2_M": QuantType(29, needs_importance=True),
    "Q2_K_S": QuantType(21, needs_importance=True),
    "Q2_K": QuantType(10),
    "IQ3_XXS": QuantType(23, needs_importance=True),
    "IQ3_XS": QuantType(22, needs_importance=True),
    "IQ3_S": QuantType(26),
    "IQ3_M": QuantType(27),
    "Q3_K_S": QuantType(11),
    "Q3_K_M": QuantType(12),
    "Q3_K_L": QuantType(13),
    "IQ4_XS": QuantType(30),
    "IQ4_NL": QuantType(25),
    "Q4_0": QuantType(2),
    "Q4_K_S": QuantType(14),
    "Q4_K_M": QuantType(15),
    "Q4_1": QuantType(3),
    "Q5_0": QuantType(8),
    "Q5_K_S": QuantType(16),
    "Q5_K_M": QuantType(17),
    "Q5_1": QuantType(9),
    "Q6_K": QuantType(18),
    "Q8_0": QuantType(7),
    "BF16": QuantType(32),
    "F16": QuantType(1),  # the exported file itself
}


def check_types(names: Sequence[str], importance: bool) -> None:
    """Raises `ConfigError` for a name that is not in the table, is there twice, or needs an importance matrix where
    none is made (`importance` is the setting)."""
    for name in names:
        if name not in QUANT_TYPES:
            close = difflib.get_close_matches(name.upper(), QUANT_TYPES, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"quantize.types: {name} is unknown; {hint}Known are {', '.join(QUANT_TYPES)}")
        if QUANT_TYPES[name].needs_importance and not importance:
            raise ConfigError(
                f"quantize.types: {name} needs an importance matrix, but quantize.importance is false; set it to true "
                "or choose a type that does without, for example Q2_K"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"quantize.types names a type twice: {', '.join(names)}; list each once")
