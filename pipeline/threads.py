"""How many threads compute: one for each core that the container may use, not for each that the machine has."""

from __future__ import annotations

import math
import os

from pipeline.memory import cores


def count() -> int:
    """OMP_NUM_THREADS if it is set, which torch obeys too, else enough for the cores that the container may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) else math.ceil(cores())
