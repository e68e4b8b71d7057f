"""Checkpoints within a stage: what it goes on from when it was killed in the middle."""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from pipeline import signals
from pipeline.config import ResumeConfig
from pipeline.disk import clear, is_full
from pipeline.mirror import Mirror, tolerated
from pipeline.sealed import clear_up, opened, seal
from pipeline.storage.local import TEMPORARY, sync

log = logging.getLogger(__name__)

KEPT = 2  # the newest can turn out torn where the disk or the bucket lost something
# Weights are safetensors. The other two hold optimizer and random states, and are read with weights_only.
FILES = ("*.safetensors", "*.json", "*.pt", "*.pth", "README.md")
LIBRARIES = ("torch", "transformers")
STEP = re.compile(r"step-\d{8}")


class Checkpoints:
    """Sealed folders `step-00000040` in `folder`, the newest two of them, each copied to `mirror` under `name`."""

    def __init__(self, folder: Path, cfg: ResumeConfig, mirror: Mirror | None = None, name: str = "") -> None:
        self.folder, self.cfg, self.mirror, self.name = folder, cfg, mirror, name
        self.saved_at = time.monotonic()
        self.copying: threading.Thread | None = None
        self.parts: list[Checkpoints] = []
        clear_up(folder)

    def part(self, name: str) -> Checkpoints:
        """Those of one of several trainings in the same stage."""
        self.parts.append(Checkpoints(self.folder / name, self.cfg, self.mirror, f"{self.name}/{name}"))
        return self.parts[-1]

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    @property
    def wanted(self) -> bool:
        return bool(self.cfg.minutes or self.cfg.steps)

    def due(self, step: int) -> bool:
        by_steps = self.cfg.steps and step % self.cfg.steps == 0
        by_time = self.cfg.minutes and time.monotonic() - self.saved_at >= 60 * self.cfg.minutes
        return bool(by_steps or by_time or (self.wanted and signals.is_stopping()))

    def save(self, step: int, write: Callable[[Path], object]) -> None:
        """The state that `write` puts into an empty folder becomes the newest checkpoint; the third newest goes.

        Where the disk has no room for it, the work goes on without: a checkpoint is worth less than the result. When
        the process is to stop, it does that here, as soon as the checkpoint is copied too. Raises `TryLater` in a start
        that was overtaken: nobody goes on from its checkpoints, and the hours cost money.
        """
        self._save(step, write)
        self.require_wanted()
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """For work that has nothing to save behind the last checkpoint, which is copied first."""
        if signals.is_stopping():
            self._wait()
            signals.stop()

    def require_wanted(self) -> None:
        """Raises `TryLater` in a start that was overtaken."""
        if self.mirror:
            self.mirror.require_not_overtaken()

    def newest(self) -> Path | None:
        """The newest whole checkpoint, brought from the bucket if it is not here; those that are torn are passed over.

        One of other versions of the libraries does not count either: its steps may not be those of these.
        """
        local = {path.name for path in self._local()}
        copied = {name.rpartition("/")[2] for name in self._copied()}
        for name in sorted(local | copied, reverse=True):
            path = self.folder / name
            if (name in local and usable(path)) or (name in copied and self._fetch(path) and usable(path)):
                return path
        return None

    def clear(self) -> None:
        """For when the stage is done: what its checkpoints were for."""
        self._wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.mirror:
            with tolerated(f"{self.name} is not removed from the output"):
                self.mirror.remove(self.name)

    def _save(self, step: int, write: Callable[[Path], object]) -> None:
        self.saved_at = time.monotonic()
        try:
            size = self._write(step, write)
        except Exception as e:  # safetensors and torch have errors of their own for a full disk
            if not is_full(self.folder, e):
                raise
            log.warning("%s: no room on the disk for a checkpoint at step %d (%s)", self._stage(), step, e)
            return
        finally:
            clear_up(self.folder)
        self._wait()  # for the copy of the one before: it must still be there
        for old in superseded([path.name for path in self._local()], self.at(step).name):
            shutil.rmtree(self.folder / old)
        log.info("%s: checkpoint at step %d, %.1f MB", self._stage(), step, size / 1e6)
        if self.mirror:
            self.copying = threading.Thread(target=self._copy, args=(self.mirror, self.at(step)), daemon=True)
            self.copying.start()

    def _write(self, step: int, write: Callable[[Path], object]) -> int:
        """How many bytes it has."""
        temporary, final = self.folder / f"{TEMPORARY}{uuid.uuid4().hex}", self.at(step)
        temporary.mkdir(parents=True)
        write(temporary)
        sealed = seal(temporary, {"step": step, "made_with": libraries()})
        clear(final)  # a torn one that was passed over
        temporary.rename(final)
        sync(self.folder)
        return sum(file.size for file in sealed.files.values())

    def _stage(self) -> str:
        return self.name.partition("/")[0] or self.folder.name

    def _local(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if STEP.fullmatch(path.name))

    def _copied(self) -> list[str]:
        if not self.mirror:
            return []
        names = (name.removeprefix(f"{self.name}/") for name in self.mirror.names(self.name))
        return [f"{self.name}/{name}" for name in names if STEP.fullmatch(name)]

    def _fetch(self, path: Path) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.mirror is not None and self.mirror.fetch(f"{self.name}/{path.name}", path, FILES)

    def _copy(self, mirror: Mirror, checkpoint: Path) -> None:
        """Beside the training, which goes on without a copy when the bucket is away."""
        with tolerated(f"{self.name}: {checkpoint.name} is not copied to the output"):
            mirror.save(checkpoint, f"{self.name}/{checkpoint.name}")
            for old in superseded(self._copied(), f"{self.name}/{checkpoint.name}"):
                mirror.remove(old)

    def _wait(self) -> None:
        for checkpoints in (self, *self.parts):
            if checkpoints.copying:
                checkpoints.copying.join()


def superseded(names: Sequence[str], newest: str) -> list[str]:
    """Those that are not needed beside `newest` and the one before it. Later steps are of checkpoints that were passed
    over: otherwise the work would have gone on from them."""
    before = sorted(name for name in names if name < newest)
    return before[: 1 - KEPT] + [name for name in names if name > newest]


def usable(checkpoint: Path) -> bool:
    sealed = opened(checkpoint)
    if sealed is None:
        return False
    if sealed.content.get("made_with") != libraries():
        log.warning("%s is passed over: it is not of these versions, %s", checkpoint, libraries())
        return False
    return True


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def libraries() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}
