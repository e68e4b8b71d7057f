"""Rewrites the README's table of settings from the settings themselves."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.report import settings_markdown  # noqa: E402
from pipeline.settings import as_table, resolve  # noqa: E402

SETTINGS = re.compile(r"(?<=<!-- settings -->\n).*(?=\n<!-- /settings -->)", re.S)


def updated(readme: str) -> str:
    table = settings_markdown(as_table(resolve({}, {})))
    return SETTINGS.sub(lambda _: table, readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
