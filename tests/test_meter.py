import subprocess
import sys
from pathlib import Path

from pipeline.meter import Meter, saw_tool

ROOT = Path(__file__).resolve().parent.parent
# In a process of its own: one that has freed much keeps the memory, and uses it again without a new peak.
SCRIPT = """
from pipeline.meter import Meter
block = bytearray(b"x" * (400 << 20))
del block
with Meter() as idle:
    pass
with Meter() as busy:
    block = bytearray(b"x" * (300 << 20))
    del block
print(idle.peak_bytes, busy.peak_bytes, busy.seconds)
"""


def test_the_peak_is_of_the_work_inside_and_not_of_what_was_freed_before():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, check=True, capture_output=True, text=True)
    idle, busy, seconds = map(float, done.stdout.split())
    assert idle < 200 << 20 < busy - idle and seconds > 0


def test_a_tool_larger_than_this_process_sets_the_peak():
    with Meter() as meter:
        saw_tool(1 << 50)
    assert meter.peak_bytes == 1 << 50
    with Meter() as later:
        pass
    assert later.peak_bytes < 1 << 50
