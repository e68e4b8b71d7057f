"""A pytest plugin that counts the faults that tests tried: `pytest --faults FILE` writes one JSON line for each kind,
and scripts/update_readme.py makes the README's table of it.

A test that tries many faults tells of them with the fixture `record_fault`; one that tries a single one has the marker
`fault(group, fault, outcome)`. What a failed test tried does not count.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FOUND: pytest.StashKey[Counter[tuple[str, str, str]]] = pytest.StashKey()
TOLD: pytest.StashKey[Counter[tuple[str, str, str]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=Path, metavar="FILE", help="Write what faults were tried, as JSON lines.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = Counter()
    config.addinivalue_line("markers", "fault(group, fault, outcome): this test tries one; for the README's table")


@pytest.fixture
def record_fault(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Tells of `count` faults of a group, and what came of them."""
    told = request.node.stash.setdefault(TOLD, Counter())

    def record(group: str, fault: str, outcome: str, count: int = 1) -> None:
        told[group, fault, outcome] += count

    return record


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call" and report.passed:
        found = item.config.stash[FOUND]
        found.update(item.stash.get(TOLD, Counter()))
        for marker in item.iter_markers("fault"):
            group, fault, outcome = marker.args
            found[group, fault, outcome] += 1
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--faults")
    if path is None:
        return
    option = session.config.option
    chosen = option.markexpr or option.keyword or session.config.args_source == pytest.Config.ArgsSource.ARGS
    with path.open("w") as file:
        file.write(json.dumps({"complete": not chosen and exitstatus == 0, "commit": commit()}) + "\n")
        for (group, fault, outcome), count in sorted(session.config.stash[FOUND].items()):
            file.write(json.dumps({"group": group, "fault": fault, "outcome": outcome, "count": count}) + "\n")


def commit() -> str:
    root = Path(__file__).resolve().parent.parent
    if not shutil.which("git"):
        return "unknown"
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
