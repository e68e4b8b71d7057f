"""A complete job for a platform, from the settings that were given: one file each, with a `render(job) -> str`.

Only what somebody set travels; a default is the image's own, and so are its paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.config import JobConfig
from pipeline.errors import ConfigError
from pipeline.settings import Resolved, all_settings, value_of
from pipeline.storage import scheme_of

PLATFORMS = ("docker", "k8s", "vertex", "sagemaker", "trainjob")
IMAGE = f"quotesmith:{__version__}"
USER = 10001  # the image's
GRACE_SECONDS = 120  # between the two signals, where the job may ask for it: enough to write a checkpoint of GPT-2
OF_THE_IMAGE = ("work_dir", "llama_cpp", "grace_seconds")
# Settings that can be a path.
PLACES = ("input", "output", "model.base", "calibration.text", "resume.uri", "tensorboard")


def asked(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Request:
    """What a job asks of its platform, beside its settings. Resources are of one node."""

    image: str = asked(IMAGE, "The image, by a name that the platform can pull.")
    gpus: int = asked(1, "GPUs of a node; 0: none.")
    cpus: int = asked(4, "CPU cores of a node, at least.")
    memory_gib: int = asked(16, "Memory of a node.")
    disk_gib: int = asked(50, "Disk of a node, for everything that the job writes.")
    nodes: int = asked(1, "Machines that train together.")
    hours: int = asked(6, "The platform ends the job after this time.")
    starts: int = asked(4, "The platform starts the job at most so often.")
    spot: bool = asked(False, "Take a cheaper machine that can be taken away (Vertex AI, SageMaker).")
    identity: str = asked(
        "",
        "Whose rights the job has: a Google service account or the ARN of an AWS role. On Kubernetes the jobs of a "
        "namespace share one.",
    )
    machine: str = asked("", "Machine or instance type (Vertex AI, SageMaker). Default: the smallest with the GPUs.")


@dataclass(frozen=True)
class Job:
    config: JobConfig
    settings: dict[str, Any]  # those that were given, by key, as JSON has them
    request: Request = field(default_factory=Request)

    @property
    def name(self) -> str:
        """A name that every platform takes: letters, digits and hyphens, at most 50."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.config.name.lower()).strip("-")
        return f"quotesmith-{slug}"[:50].rstrip("-")

    @property
    def grace_seconds(self) -> int:
        return int(self.settings.get("grace_seconds", GRACE_SECONDS))

    def travelling(self) -> dict[str, Any]:
        return {key: value for key, value in self.settings.items() if key not in OF_THE_IMAGE}

    def texts(self) -> dict[str, str]:
        """The travelling settings by key, as text that the settings read back."""
        return {key: as_text(value) for key, value in self.travelling().items()}

    def env(self) -> dict[str, str]:
        """The same by the names of their environment variables."""
        names = {setting.key: setting.env for setting in all_settings()}
        return {names[key]: text for key, text in self.texts().items()}

    def places(self) -> Iterator[tuple[str, str]]:
        """(key, path or URI) of every setting that names a place, and was given."""
        for key in PLACES:
            value = self.settings.get(key, "")
            for each in value if isinstance(value, list) else [value]:
                if each:
                    yield key, each

    def local_paths(self) -> Iterator[tuple[str, str]]:
        """(key, path) of those that are on this machine."""
        return ((key, place) for key, place in self.places() if is_local(key, place))

    def schemes(self) -> set[str]:
        """Of the buckets that the job uses; "" stands for all else."""
        return {scheme_of(place) for _, place in self.places()}


def job_of(resolved: Resolved, request: Request) -> Job:
    given = [setting.key for setting in all_settings() if resolved.origins[setting.key] != "default"]
    return Job(resolved.config, {key: value_of(resolved.config, key) for key in given}, request)


def render(platform: str, job: Job) -> str:
    """Raises `ConfigError` for what the platform cannot do."""
    text: str = import_module(f"pipeline.render.{platform}").render(job)
    return text


def require_buckets(job: Job, platform: str, *schemes: str) -> None:
    """A machine that has nothing of this one: everything comes from a bucket and goes to one."""
    for key, path in job.local_paths():
        raise ConfigError(
            f"{key} is {path}, a path of this machine, which {platform} does not have; use a bucket's URI"
        )
    output = job.settings.get("output", "")
    if scheme_of(output) not in schemes:
        wanted = " or ".join(f"{scheme}://" for scheme in schemes)
        raise ConfigError(f"output is {output or 'not set'}; on {platform} it must be a bucket ({wanted}…)")


def refuse(job: Job, platform: str, *fields: str) -> None:
    """Options of the request that have no meaning there."""
    plain = Request()
    for name in fields:
        if getattr(job.request, name) != getattr(plain, name):
            raise ConfigError(f"--{name.replace('_', '-')} means nothing to {platform}; leave it out")


def is_local(key: str, value: str) -> bool:
    if scheme_of(value) not in ("", "file"):
        return False
    if key != "model.base":
        return True
    return value.startswith(("/", ".", "~")) or value.endswith(".gguf") or Path(value).exists()  # else a hub id


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
