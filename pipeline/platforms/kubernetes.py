"""A pod. Settings come by a ConfigMap, which is the environment; why it failed goes to the termination message.

A pod of an Indexed Job or of a JobSet knows its index; the manifests of k8s/ add how many there are and where the
first is (https://kubernetes.io/docs/concepts/workloads/controllers/job/#completion-mode).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import JobConfig
from pipeline.platforms import MASTER_PORT, Nodes, Values, integer

TERMINATION_LOG = Path("dev/termination-log")  # terminationMessagePath's default; the kubelet reads 4,096 bytes of it
GRACE_SECONDS = 30  # terminationGracePeriodSeconds' default
INDEX = "JOB_COMPLETION_INDEX"  # set by Kubernetes itself


@dataclass(frozen=True)
class Kubernetes:
    env: Mapping[str, str]
    root: Path

    name = "Kubernetes"

    def orders(self) -> Values:
        return {}

    def places(self) -> Values:
        return {"grace_seconds": (GRACE_SECONDS, "Kubernetes' default")}

    def check(self, cfg: JobConfig) -> None:
        """Nothing is impossible here."""

    def nodes(self) -> Nodes:
        count = integer(self.env, "NNODES", 1)
        if count == 1:
            return Nodes()
        master = self.env.get("MASTER_ADDR", "")
        return Nodes(count, integer(self.env, INDEX), master, integer(self.env, "MASTER_PORT", MASTER_PORT))

    def note(self) -> Path | None:
        path = self.root / TERMINATION_LOG
        return path if path.exists() else None  # mounted by the kubelet; anything else would be a file nobody reads


def find(env: Mapping[str, str], root: Path) -> Kubernetes | None:
    """Every pod has the address of the API server in its environment; `podman kube play` mounts only the log."""
    in_pod = "KUBERNETES_SERVICE_HOST" in env or (root / TERMINATION_LOG).exists()
    return Kubernetes(env, root) if in_pod else None
