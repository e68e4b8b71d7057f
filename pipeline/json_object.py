"""JSON that somebody else wrote."""

from __future__ import annotations

import json
from typing import Any

from pipeline.errors import QuotesmithError


def json_object(
    text: str | bytes, what: str, error: type[QuotesmithError], needed: str = "a JSON object"
) -> dict[str, Any]:
    """The object that `text` is. Raises `error`, about `what`, for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise error(f"{what} is not valid JSON ({e}); needed {needed}") from e
    if not isinstance(content, dict):
        raise error(f"{what} holds a {type(content).__name__}; needed {needed}")
    return content
