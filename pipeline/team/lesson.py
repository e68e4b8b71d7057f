"""What is to be learned, as machine 0 writes it down for every training process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.artifacts import Checkpoint, TokenDataset
from pipeline.checkpoints import Checkpoints
from pipeline.config import ResumeConfig, TrainConfig
from pipeline.mirror import Mirror

FACTS = "facts.json"  # what machine 0's first process measured


@dataclass(frozen=True)
class Keeping:
    """Where checkpoints are kept, and copied to."""

    folder: Path
    cfg: ResumeConfig
    name: str
    output: str | None  # None: no copies
    run_id: str

    @classmethod
    def of(cls, checkpoints: Checkpoints) -> Keeping:
        mirror = checkpoints.mirror
        output, run_id = (mirror.output, mirror.run_id) if mirror else (None, "")
        return cls(checkpoints.folder, checkpoints.cfg, checkpoints.name, output, run_id)

    def checkpoints(self) -> Checkpoints:
        """Without the run's owner, which is another process; `Lesson.require_wanted` is its part."""
        mirror = Mirror(self.output, self.run_id) if self.output else None
        return Checkpoints(self.folder, self.cfg, mirror, self.name)


@dataclass(frozen=True)
class Lesson:
    """Paths are machine 0's; `worker.py` brings the files to the others."""

    base: Checkpoint
    tokens: TokenDataset
    cfg: TrainConfig
    batch_size: int
    device: str
    seed: int
    out: Path
    keeping: Keeping | None

    def as_json(self) -> str:
        return TypeAdapter(Lesson).dump_json(self).decode()

    @classmethod
    def parsed(cls, text: str | bytes) -> Lesson:
        return TypeAdapter(cls).validate_json(text)
