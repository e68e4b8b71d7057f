"""A machine's line to the store where the machines of a job meet (torch's TCPStore, on the first).

A call to a machine that was switched off can hang for ever, so a thread of its own does all the talking, and everybody
else asks only what it has heard.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch.distributed has no __all__

from pipeline.stage import code_digest

BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.05
MACHINE = "machine/{}"  # by rank: whose process it is, and that it lives


class Line(threading.Thread):
    """Says what it is given, and its own beat, and hears the keys of `wanted`, once a second."""

    def __init__(self, store: TCPStore, rank: int, wanted: Callable[[], Iterable[str]]) -> None:
        super().__init__(name="meeting", daemon=True)
        self.store, self.wanted = store, wanted
        self.me = MACHINE.format(rank)
        self.id = uuid.uuid4().hex
        self.beats = 0
        self.heard: dict[str, bytes] = {}
        self.changed_at: dict[str, float] = {}  # on the clock of time.monotonic
        self.last_at = time.monotonic()
        self.broken = ""
        self._to_say: dict[str, str] = {}
        self._wake, self._closed = threading.Event(), False

    def say(self, key: str, value: str) -> None:
        self._to_say[key] = value
        self._wake.set()

    def was_said(self, seconds: float) -> bool:
        """Whether everything was, waiting for that for a while."""
        end = time.monotonic() + seconds
        while self._to_say and not self.broken and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
        return not self._to_say

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def silence(self, key: str) -> float:
        """Seconds since the key had another value; since it was looked for first, if it has none."""
        return time.monotonic() - self.changed_at.setdefault(key, time.monotonic())

    def run(self) -> None:
        while not self._closed:
            try:
                self._exchange()
            except Exception as e:  # whatever it is: the others must be told
                self.broken = " ".join(str(e).split())[:200] or type(e).__name__
                return
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _exchange(self) -> None:
        self.beats += 1
        self.store.set(self.me, json.dumps({"id": self.id, "beat": self.beats, "code": code_digest()}))
        for key, said in list(self._to_say.items()):
            self.store.set(key, said)
            if self._to_say[key] == said:
                del self._to_say[key]
        news = {}
        for key in self.wanted():
            if self.store.check([key]) and (value := self.store.get(key)) != self.heard.get(key):
                news[key] = value
        self.last_at = time.monotonic()
        self.changed_at.update(dict.fromkeys(news, self.last_at))
        self.heard.update(news)  # at once: nobody is seen to have left without the verdict that it gave before
