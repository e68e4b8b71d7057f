"""A Vertex AI custom job. With a baseOutputDirectory it names three gs:// folders in AIP_*, and it says in
CLUSTER_SPEC which replicas there are (https://cloud.google.com/vertex-ai/docs/training/distributed-training).

How long it waits between SIGTERM and SIGKILL is not documented, so docker's time stays the default. It shows the log
and the exit code; there is no place for a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import JobConfig
from pipeline.errors import ConfigError
from pipeline.json_object import json_object
from pipeline.platforms import MASTER_PORT, Nodes, Values

SETTINGS = {"AIP_MODEL_DIR": "output", "AIP_CHECKPOINT_DIR": "resume.uri", "AIP_TENSORBOARD_LOG_DIR": "tensorboard"}
FUSE = "/gcs/"
SPEC = "CLUSTER_SPEC"
POOLS = ("workerpool0", "workerpool1")  # the primary replica, the others
MARKS = (SPEC, "CLOUD_ML_JOB_ID", *SETTINGS)


@dataclass(frozen=True)
class Vertex:
    env: Mapping[str, str]

    name = "Vertex AI"

    def orders(self) -> Values:
        return {}

    def places(self) -> Values:
        named = {key: (name, self.env.get(name, "").rstrip("/")) for name, key in SETTINGS.items()}
        return {key: (value, f"Vertex AI's {name}") for key, (name, value) in named.items() if value}

    def check(self, cfg: JobConfig) -> None:
        """/gcs/… shows buckets as folders, without locks, links and renames that are all or nothing."""
        written = {"output": cfg.output, "resume.uri": cfg.resume.uri, "tensorboard": cfg.tensorboard}
        for key, path in {**written, "work_dir": str(cfg.work_dir)}.items():
            if path.startswith(FUSE):
                raise ConfigError(
                    f"{key} is {path}, which a job can only read from; "
                    + ("choose a folder elsewhere" if key == "work_dir" else f"use gs://{path.removeprefix(FUSE)}")
                )

    def nodes(self) -> Nodes:
        if not self.env.get(SPEC):
            return Nodes()
        spec = json_object(self.env[SPEC], SPEC, ConfigError)
        try:
            return nodes_of(spec)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise ConfigError(f"{SPEC} is not as Vertex AI writes it: {type(e).__name__} {e}") from e

    def note(self) -> None:
        """It shows the log."""


def nodes_of(spec: Mapping[str, Any]) -> Nodes:
    pools, task = spec["cluster"], spec["task"]
    if others := sorted(name for name, replicas in pools.items() if replicas and name not in POOLS):
        raise ConfigError(f"{SPEC} has {others[0]}; needed replicas in {POOLS[0]} and {POOLS[1]} only")
    replicas = [(pool, index) for pool in POOLS for index in range(len(pools.get(pool, ())))]
    if len(replicas) == 1:
        return Nodes()
    host, _, port = pools[POOLS[0]][0].partition(":")
    return Nodes(len(replicas), replicas.index((task["type"], int(task["index"]))), host, int(port or MASTER_PORT))


def find(env: Mapping[str, str], root: Path) -> Vertex | None:
    return Vertex(env) if any(name in env for name in MARKS) else None
