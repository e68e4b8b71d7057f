"""The pod that Job, JobSet and TrainJob start: restricted Pod Security, everything it writes in volumes of its own."""

from __future__ import annotations

from typing import Any

from pipeline.errors import no_retry_helps
from pipeline.platforms import MASTER_PORT
from pipeline.platforms.kubernetes import TERMINATION_LOG
from pipeline.render import USER, Job

Object = dict[str, Any]

ACCOUNT = "quotesmith"
SECRETS = "quotesmith-secrets"  # a Secret of environment variables, if there is one: HF_TOKEN, AWS_…
GPU = "nvidia.com/gpu"
SHM_GIB = 1  # counts as memory; NCCL and torch's loaders pass tensors through it


def settings_of(name: str) -> str:
    """The ConfigMap of environment variables of one job."""
    return f"{name}-settings"


def labels(name: str) -> Object:
    return {"app.kubernetes.io/name": "quotesmith", "app.kubernetes.io/instance": name}


def template(job: Job, name: str, container: str, env: Object | None = None) -> Object:
    """`env` says where the other nodes are."""
    spec: Object = {
        "restartPolicy": "Never",  # podFailurePolicy asks for it; a restart is another pod
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": job.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container_of(job, name, container, env or {})],
        "volumes": [
            {"name": "work", "emptyDir": {"sizeLimit": f"{job.request.disk_gib}Gi"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHM_GIB}Gi"}},
        ],
    }
    if job.request.gpus:
        spec["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": labels(name)}, "spec": spec}


def container_of(job: Job, name: str, container: str, env: Object) -> Object:
    return {
        "name": container,
        "image": job.request.image,
        "imagePullPolicy": "IfNotPresent",
        "args": ["run"],
        "workingDir": "/work",
        "env": as_env({"QUOTESMITH_GRACE_SECONDS": str(job.grace_seconds), **env}),
        "envFrom": [
            {"configMapRef": {"name": settings_of(name)}},
            {"secretRef": {"name": SECRETS, "optional": True}},
        ],
        "resources": resources(job),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": f"/{TERMINATION_LOG}",
        "terminationMessagePolicy": "FallbackToLogsOnError",  # for an end that leaves no message
        "volumeMounts": [
            {"name": "work", "mountPath": "/work"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def as_env(values: Object) -> list[Object]:
    return [{"name": name, "value": value} for name, value in values.items()]


def resources(job: Job) -> Object:
    request = job.request
    fixed: Object = {"memory": f"{request.memory_gib}Gi", "ephemeral-storage": f"{request.disk_gib + 2}Gi"}
    if request.gpus:
        fixed[GPU] = str(request.gpus)
    return {"requests": {"cpu": str(request.cpus), **fixed}, "limits": fixed}


def failure_policy(container: str, on_disruption: str = "Ignore") -> Object:
    """A disruption is nobody's failure; what no retry can help ends the job; anything else counts to backoffLimit."""
    no_retry: Object = {"containerName": container, "operator": "In", "values": no_retry_helps()}
    return {
        "rules": [
            {"action": on_disruption, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": no_retry},
        ]
    }


def where(master: str, nodes: int) -> Object:
    """What `platforms/kubernetes.py` reads; the rank is JOB_COMPLETION_INDEX, which Kubernetes sets."""
    return {"NNODES": str(nodes), "MASTER_ADDR": master, "MASTER_PORT": str(MASTER_PORT)}
