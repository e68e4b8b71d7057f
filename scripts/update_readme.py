"""Rewrites the README's tables: of settings from the settings themselves and, with --faults FILE, of faults tried from
what `pytest --faults=FILE` wrote."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.report import settings_markdown  # noqa: E402
from pipeline.settings import as_table, resolve  # noqa: E402

SETTINGS = re.compile(r"(?<=<!-- settings -->\n).*(?=\n<!-- /settings -->)", re.S)
FAULTS = re.compile(r"(?<=<!-- faults -->\n).*(?=\n<!-- /faults -->)", re.S)
FAULTS_SECTION = "## Faults tried\n\n<!-- faults -->\n\n<!-- /faults -->\n\n"
BEFORE_FAULTS = "## Gates\n"
LOOKED_AT = "whole jobs, spoilt where they write"  # the group of tests/test_write_boundaries.py
EVERY = "every write (a full tmpfs: from every stage on)"
SAMPLE = "a sample of the writes, SIGKILL also at every one that commits something (a full tmpfs: from every stage on)"


def updated(readme: str) -> str:
    table = settings_markdown(as_table(resolve({}, {})))
    return SETTINGS.sub(lambda _: table, readme)


def with_faults(readme: str, lines: str) -> str:
    """`readme` with the table of the faults that a whole run of the tests tried; ValueError for a part of a run."""
    head, *told = (json.loads(line) for line in lines.splitlines())
    if not head["complete"]:
        raise ValueError("only a run of all tests that passes makes the table: pytest --faults=FILE")
    if not FAULTS.search(readme):
        readme = readme.replace(BEFORE_FAULTS, FAULTS_SECTION + BEFORE_FAULTS)
    return FAULTS.sub(lambda _: faults_markdown(head, told), readme)


def faults_markdown(head: dict[str, Any], told: list[dict[str, str]]) -> str:
    outcomes: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for each in told:
        outcomes[each["group"], each["fault"]][each["outcome"]] += int(each["count"])
    total = sum(found.total() for found in outcomes.values())
    groups: Counter[str] = Counter()
    for (group, _), found in outcomes.items():
        groups[group] += found.total()
    by_group = "; ".join(f"{group}: {count:,}" for group, count in groups.most_common())
    rows = [
        f"{total:,} faults, none with anything lost or half published: with any other outcome the tests fail. "
        f"By group: {by_group}.",
        "",
        f"Those of {LOOKED_AT} came at "
        f"{EVERY if head['every_fault'] else SAMPLE}, each followed by a look at everything that was left. "
        f"(Written by the tests at commit {head['commit']}.)",
        "",
        "| where | fault | tried | outcome |",
        "|---|---|---|---|",
    ]
    for (group, fault), found in sorted(outcomes.items()):
        said = "; ".join(f"{count:,} {outcome}" for outcome, count in found.most_common()) if len(found) > 1 else ""
        rows.append(f"| {group} | {fault} | {found.total():,} | {said or next(iter(found))} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=Path, metavar="FILE")
    given = parser.parse_args()
    path = ROOT / "README.md"
    readme = updated(path.read_text(encoding="utf-8"))
    if given.faults:
        try:
            readme = with_faults(readme, given.faults.read_text(encoding="utf-8"))
        except ValueError as e:
            sys.exit(str(e))
    path.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
