"""Progress bars for people on a terminal; nowhere else, and not between JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from pipeline import logs

Item = TypeVar("Item")


def wanted() -> bool:
    return logs.on_terminal() and not logs.as_json()


def bar(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """`items`, with a bar called `what` while they are walked through; it vanishes at the end."""
    yield from tqdm(items, desc=what, total=total, leave=False, disable=not wanted())
