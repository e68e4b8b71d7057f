import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from update_readme import updated  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_the_one_the_settings_make():
    assert updated(README) == README and "--train.learning-rate" in README


def test_every_path_the_readme_names_exists():
    named = set(re.findall(r"`((?:scripts|pipeline|tests)/[\w./-]+)`", README))
    assert named and not [name for name in named if not (ROOT / name).exists()]
