"""Something that is wrong with a machine, in plain words, with what probably causes it."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    fatal: bool  # no job can run like that; else it is a remark
    what: str
    causes: tuple[str, ...] = ()  # the likeliest first

    def lines(self) -> list[str]:
        head = f"{'problem' if self.fatal else 'remark'}: {self.what}"
        if not self.causes:
            return [head]
        numbered = [f"  {number}. {cause}" for number, cause in enumerate(self.causes, 1)]
        return [f"{head}. Likely {'causes' if len(numbered) > 1 else 'cause'}:", *numbered]
