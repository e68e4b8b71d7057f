"""A node of a Kubeflow TrainJob: a pod whose trainer injects what torchrun reads, PET_*
(https://www.kubeflow.org/docs/components/trainer/)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.platforms import Nodes, integer
from pipeline.platforms.kubernetes import Kubernetes


class TrainJob(Kubernetes):
    name = "Kubeflow Trainer"

    def nodes(self) -> Nodes:
        count = integer(self.env, "PET_NNODES")
        if count == 1:
            return Nodes()
        port = integer(self.env, "PET_MASTER_PORT")
        return Nodes(count, integer(self.env, "PET_NODE_RANK"), self.env.get("PET_MASTER_ADDR", ""), port)


def find(env: Mapping[str, str], root: Path) -> TrainJob | None:
    return TrainJob(env, root) if "PET_NNODES" in env else None
