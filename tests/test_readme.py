import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from update_readme import updated, with_faults  # noqa: E402

from tests.test_write_boundaries import GROUP  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_the_one_the_settings_make():
    assert updated(README) == README and "--train.learning-rate" in README


def test_every_path_the_readme_names_exists():
    named = set(re.findall(r"`((?:scripts|pipeline|tests)/[\w./-]+)`", README))
    assert named and not [name for name in named if not (ROOT / name).exists()]


def told(*lines, complete=True, every_fault=False):
    head = {"complete": complete, "commit": "abc1234", "every_fault": every_fault}
    return "\n".join(json.dumps(line) for line in (head, *lines))


KILLED = {"group": "jobs", "fault": "SIGKILL", "outcome": "went on", "count": 1200}


def test_the_table_of_faults_counts_them_by_group_and_outcome():
    more = [
        {**KILLED, "fault": "disk full", "outcome": outcome, "count": 2} for outcome in ("ended", "ended", "went on")
    ]
    readme = with_faults("# x\n\n## Gates\n", told(KILLED, *more))
    assert "1,206 faults, none with anything lost" in readme and "By group: jobs: 1,206." in readme
    assert "commit abc1234" in readme
    assert "| jobs | SIGKILL | 1,200 | went on |\n| jobs | disk full | 6 | 4 ended; 2 went on |" in readme
    again = with_faults(readme, told(KILLED))
    assert "disk full" not in again and again.count("## Faults tried") == 1 and again.endswith("\n\n## Gates\n")


@pytest.mark.parametrize(
    ("every_fault", "said"), [(True, "came at every write (a full"), (False, "came at a sample of the writes")]
)
def test_the_table_says_whether_whole_jobs_were_spoilt_at_every_write(every_fault, said):
    readme = with_faults("# x\n\n## Gates\n", told(KILLED, every_fault=every_fault))
    assert said in readme and GROUP in readme


def test_a_part_of_a_run_makes_no_table_of_faults():
    with pytest.raises(ValueError, match="only a run of all tests"):
        with_faults(README, told(KILLED, complete=False))
