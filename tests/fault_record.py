"""A pytest plugin that counts the faults that tests tried: `pytest --faults=FILE` writes one JSON line for each kind,
and scripts/update_readme.py makes the README's table of it.

A test that tries many faults tells of them with the fixture `record_fault`; one that tries a single one has the marker
`fault(group, fault, outcome)`. What a failed test tried does not count.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

EVERY_FAULT = bool(os.environ.get("EVERY_FAULT"))  # whole jobs are spoilt wherever they write
TOLD: pytest.StashKey[Counter[tuple[str, str, str]]] = pytest.StashKey()
PROPERTY = "faults"  # of a test's report: reports come to the controller from the processes that pytest-xdist starts


class Record:
    """All that passed tests told of, in the process that has every report."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str, str]] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, told in report.user_properties:
            if name == PROPERTY:
                for group, fault, outcome, count in told:  # type: ignore[attr-defined]
                    self.found[group, fault, outcome] += count


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=Path, metavar="FILE", help="Write what faults were tried, as JSON lines.")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Record(), PROPERTY)
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
        told = item.stash.get(TOLD, Counter()) + Counter(marker.args for marker in item.iter_markers("fault"))
        report.user_properties.append((PROPERTY, [[*key, count] for key, count in told.items()]))
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--faults")
    if path is None or hasattr(session.config, "workerinput"):
        return
    option = session.config.option
    chosen = option.markexpr or option.keyword or session.config.args_source == pytest.Config.ArgsSource.ARGS
    record = session.config.pluginmanager.get_plugin(PROPERTY)
    with path.open("w") as file:
        head = {"complete": not chosen and exitstatus == 0, "commit": commit(), "every_fault": EVERY_FAULT}
        file.write(json.dumps(head) + "\n")
        for (group, fault, outcome), count in sorted(record.found.items()):
            file.write(json.dumps({"group": group, "fault": fault, "outcome": outcome, "count": count}) + "\n")


def commit() -> str:
    root = Path(__file__).resolve().parent.parent
    if not shutil.which("git"):
        return "unknown"
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
