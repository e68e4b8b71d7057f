"""Where the job runs, one file each with a `find(env, root)` of its own. Only these files know a platform's names.

`root` is the file system's root, so that a test can have one of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from pipeline.config import JobConfig
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

# The first that finds itself. A node of a TrainJob is a pod too, so it comes before Kubernetes.
NAMES = ("sagemaker", "vertex", "trainjob", "kubernetes", "local")
MASTER_PORT = 29500  # where the platform names none; torchrun's own
Values = Mapping[str, tuple[Any, str]]  # a setting's key to its value and to where that comes from


@dataclass(frozen=True)
class Nodes:
    """The machines that one job was given, and which of them this is. `master` is the address of rank 0."""

    count: int = 1
    rank: int = 0
    master: str = "localhost"
    port: int = MASTER_PORT

    def places(self, platform: str) -> Values:
        """The settings that say so; none for one machine."""
        if self.count == 1:
            return {}
        return {f"nodes.{name}": (value, f"{platform}'s nodes") for name, value in asdict(self).items()}


class Platform(Protocol):
    """What a platform tells the job, and where it looks for what the job tells it."""

    @property
    def name(self) -> str:
        """For messages."""

    def orders(self) -> Values:
        """Settings that the submitted job has, which beat the environment. Names need not exist."""

    def places(self) -> Values:
        """Settings that beat only the defaults: paths of the platform, its grace period."""

    def check(self, cfg: JobConfig) -> None:
        """Raises `ConfigError` for settings that cannot work there."""

    def nodes(self) -> Nodes:
        """Raises `ConfigError` for what cannot be understood."""

    def note(self) -> Path | None:
        """The file in which the platform looks for why the job failed; None: in the log and the exit code alone."""


def find(env: Mapping[str, str], root: Path) -> Platform:
    for name in NAMES:
        if found := import_module(f"pipeline.platforms.{name}").find(env, root):
            return cast(Platform, found)
    raise AssertionError("local.find always finds itself")


def here() -> Platform:
    return find(os.environ, Path("/"))


def integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError as e:
        raise ConfigError(f"the environment variable {name} is {text!r}; needed a whole number") from e


def report(platform: Platform, sentence: str) -> None:
    """Say why the job failed where the platform shows it. Raises nothing."""
    if not (path := platform.note()):
        return
    try:
        path.write_text(sentence + "\n", encoding="utf-8")
    except OSError as e:
        log.warning("%s could not be written: %s", path, e.strerror)
