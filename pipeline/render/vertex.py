"""A file for `gcloud ai custom-jobs create --config`: a CustomJobSpec
(https://cloud.google.com/vertex-ai/docs/reference/rest/v1/CustomJobSpec)."""

from __future__ import annotations

import yaml

from pipeline.errors import ConfigError
from pipeline.render import Job, refuse, require_buckets
from pipeline.render.pod import Object, as_env

# Vertex AI has no GPU without a machine type that fits it: those with NVIDIA L4 (24 GB), and one without a GPU.
MACHINES = {0: "n2-standard-8", 1: "g2-standard-8", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"}
ACCELERATORS = {"g2-": "NVIDIA_L4", "a2-ultragpu-": "NVIDIA_A100_80GB", "a2-": "NVIDIA_TESLA_A100"}
ACCELERATORS |= {"a3-highgpu-": "NVIDIA_H100_80GB", "a3-megagpu-": "NVIDIA_H100_MEGA_80GB", "n1-": "NVIDIA_TESLA_T4"}


def render(job: Job) -> str:
    refuse(job, "Vertex AI, where the machine type decides them,", "cpus", "memory_gib")
    refuse(job, "Vertex AI", "starts")
    require_buckets(job, "Vertex AI", "gs", "s3")
    return yaml.safe_dump(custom_job_spec(job), sort_keys=False, allow_unicode=True, width=110)


def custom_job_spec(job: Job) -> Object:
    request = job.request
    pools = [pool(job, 1)]
    if request.nodes > 1:  # the first pool is the primary replica alone
        pools.append(pool(job, request.nodes - 1))
    scheduling: Object = {"timeout": f"{request.hours * 3600}s", "restartJobOnWorkerRestart": True}
    if request.spot:
        scheduling["strategy"] = "SPOT"
    spec: Object = {"workerPoolSpecs": pools, "scheduling": scheduling}
    if request.identity:
        spec["serviceAccount"] = request.identity
    return spec


def pool(job: Job, replicas: int) -> Object:
    return {
        "machineSpec": machine(job),
        "replicaCount": replicas,
        "diskSpec": {"bootDiskType": "pd-ssd", "bootDiskSizeGb": max(job.request.disk_gib, 100)},  # its least
        "containerSpec": {"imageUri": job.request.image, "args": ["run"], "env": as_env(job.env())},
    }


def machine(job: Job) -> Object:
    gpus = job.request.gpus
    kind = job.request.machine or MACHINES.get(gpus)
    if kind is None:
        raise ConfigError(
            f"no machine with {gpus} NVIDIA L4 is known; name one with --machine, or ask for 1, 2, 4 or 8"
        )
    spec: Object = {"machineType": kind}
    if gpus:
        accelerator = next((name for start, name in ACCELERATORS.items() if kind.startswith(start)), None)
        if accelerator is None:
            raise ConfigError(
                f"machine type {kind} has no GPU that is known here; needed one of {', '.join(ACCELERATORS)}"
            )
        spec |= {"acceleratorType": accelerator, "acceleratorCount": gpus}
    return spec
