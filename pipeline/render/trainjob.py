"""A Kubeflow TrainJob with a TrainingRuntime of its own, in which the pod is described; the trainer adds PET_*."""

from __future__ import annotations

from pipeline.render import Job, refuse, require_buckets
from pipeline.render.k8s import as_yaml, head, job_set_spec, surroundings
from pipeline.render.pod import Object

API = "trainer.kubeflow.org/v1alpha1"
NODE = "node"  # what the trainer looks for: a replicated job and a container of this name
STEP = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


def render(job: Job) -> str:
    refuse(job, "trainjob", "machine", "spot")
    require_buckets(job, "a pod", "gs", "s3")
    return as_yaml([*surroundings(job, job.name), *train_job(job, job.name)])


def train_job(job: Job, name: str) -> list[Object]:
    nodes = job.request.nodes
    spec = job_set_spec(job, name, NODE, NODE)
    replicated = spec["replicatedJobs"][0]["template"]
    replicated["metadata"] = {"labels": STEP}
    for counted in ("completions", "parallelism"):  # from numNodes
        del replicated["spec"][counted]
    runtime = head(API, "TrainingRuntime", name, of=name)
    runtime["metadata"]["labels"] |= {"trainer.kubeflow.org/framework": "torch"}
    policy: Object = {"numNodes": nodes, "torch": {}}
    return [
        {**runtime, "spec": {"mlPolicy": policy, "template": {"spec": spec}}},
        {
            **head(API, "TrainJob", name, of=name),
            "spec": {
                "runtimeRef": {"apiGroup": API.partition("/")[0], "kind": "TrainingRuntime", "name": name},
                "trainer": {"numNodes": nodes},
            },
        },
    ]
