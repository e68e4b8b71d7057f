"""Kubernetes manifests: a Job, with several nodes an Indexed Job and the Service that names its pods; or a JobSet.

scripts/update_k8s.py writes k8s/ with them, so that the two never differ.
"""

from __future__ import annotations

import yaml

from pipeline.errors import ConfigError
from pipeline.render import Job, refuse, require_buckets
from pipeline.render.pod import ACCOUNT, Object, failure_policy, labels, settings_of, template, where

CONTAINER = "quotesmith"
KEPT_SECONDS = 24 * 3600  # a finished job, for whoever wants to read its log
# Beyond a lease's time: a pod that was killed gives nothing back, and the next must not spend a start on that.
LEASE_MARGIN_SECONDS = 15
WORKERS = "workers"
# GKE's metadata server, which hands out a service account's tokens, under both of its addresses
# (https://cloud.google.com/kubernetes-engine/docs/how-to/workload-identity).
METADATA: Object = {
    "to": [{"ipBlock": {"cidr": f"169.254.169.{last}/32"}} for last in (252, 254)],
    "ports": [{"protocol": "TCP", "port": port} for port in (80, 988)],
}
IDENTITIES = {"arn:": "eks.amazonaws.com/role-arn", "": "iam.gke.io/gcp-service-account"}


def render(job: Job) -> str:
    refuse(job, "k8s", "machine", "spot")
    require_buckets(job, "a pod", "gs", "s3")
    return as_yaml([*surroundings(job, job.name), *workload(job, job.name)])


class Dumper(yaml.SafeDumper):
    """Without anchors: an object that stands in two places is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def as_yaml(objects: list[Object]) -> str:
    return yaml.dump_all(objects, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def surroundings(job: Job, name: str) -> list[Object]:
    return [service_account(job), config_map(job, name), network_policy(job, name)]


def service_account(job: Job) -> Object:
    account = head("v1", "ServiceAccount", ACCOUNT)  # of all jobs
    if identity := job.request.identity:
        annotation = next(text for start, text in IDENTITIES.items() if identity.startswith(start))
        account["metadata"]["annotations"] = {annotation: identity}
    return {**account, "automountServiceAccountToken": False}


def config_map(job: Job, name: str) -> Object:
    """It cannot be changed under a job that is there: a pod that is started again would have other settings."""
    wait_seconds = f"{job.config.lease.seconds + LEASE_MARGIN_SECONDS:g}"
    data = {"QUOTESMITH_LEASE_WAIT_SECONDS": wait_seconds, **job.env()}
    return {**head("v1", "ConfigMap", settings_of(name), of=name), "immutable": True, "data": data}


def network_policy(job: Job, name: str) -> Object:
    """Out: names, HTTPS, which is where buckets and the hub are, and Google's tokens. In: the job's other nodes."""
    egress: list[Object] = [
        {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]},
        {"ports": [{"protocol": "TCP", "port": 443}]},
    ]
    if "gs" in job.schemes():
        egress.append(METADATA)
    pods = {"matchLabels": labels(name)}
    spec: Object = {"podSelector": pods, "policyTypes": ["Ingress", "Egress"], "ingress": [], "egress": egress}
    if job.request.nodes > 1:  # NCCL and gloo choose their ports themselves
        peers = [{"podSelector": dict(pods)}]
        spec["ingress"] = [{"from": peers}]
        egress.append({"to": peers})
    return {**head("networking.k8s.io/v1", "NetworkPolicy", name, of=name), "spec": spec}


def workload(job: Job, name: str) -> list[Object]:
    return [one_node(job, name)] if job.request.nodes == 1 else indexed(job, name)


def one_node(job: Job, name: str) -> Object:
    return {**head("batch/v1", "Job", name, of=name), "spec": job_spec(job, template(job, name, CONTAINER))}


def job_spec(job: Job, pod: Object) -> Object:
    return {
        "backoffLimit": (job.request.starts - 1) * job.request.nodes,
        "activeDeadlineSeconds": job.request.hours * 3600,
        "ttlSecondsAfterFinished": KEPT_SECONDS,
        "podReplacementPolicy": "Failed",  # the next pod comes when the last one is gone
        "podFailurePolicy": failure_policy(CONTAINER),
        "template": pod,
    }


def indexed(job: Job, name: str) -> list[Object]:
    """Pods called NAME-0, NAME-1, … which find each other through a Service without an address of its own."""
    nodes = job.request.nodes
    pod = template(job, name, CONTAINER, where(f"{name}-0.{name}", nodes))
    pod["spec"]["subdomain"] = name
    numbered = {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes}
    return [
        service(name),
        {**head("batch/v1", "Job", name, of=name), "spec": {**numbered, **job_spec(job, pod)}},
    ]


def service(name: str) -> Object:
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels(name)}
    return {**head("v1", "Service", name, of=name), "spec": spec}


def job_set(job: Job, name: str) -> Object:
    """All nodes or none: the failure of one starts the set anew, a disruption without counting (JobSet 0.9)."""
    if job.request.nodes < 2:
        raise ConfigError("a JobSet is for several nodes; ask for at least two, or for a Job")
    return {
        **head("jobset.x-k8s.io/v1alpha2", "JobSet", name, of=name),
        "spec": job_set_spec(job, name, WORKERS, CONTAINER, where(f"{name}-{WORKERS}-0-0.{name}", job.request.nodes)),
    }


def job_set_spec(job: Job, name: str, group: str, container: str, env: Object | None = None) -> Object:
    nodes = job.request.nodes
    spec = job_spec(job, template(job, name, container, env)) | {
        "backoffLimit": 0,
        "podFailurePolicy": failure_policy(container, on_disruption="FailJob"),
    }
    del spec["ttlSecondsAfterFinished"]  # the set's
    return {
        "ttlSecondsAfterFinished": KEPT_SECONDS,
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": job.request.starts - 1,
            "rules": [
                {
                    "name": "disruption",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                    "onJobFailureMessagePatterns": [".*DisruptionTarget.*"],
                },
                {"name": "noRetryHelps", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                {"name": "deadline", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]},
            ],
        },
        "replicatedJobs": [
            {
                "name": group,
                "replicas": 1,
                "template": {"spec": {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes, **spec}},
            }
        ],
    }


def head(version: str, kind: str, name: str, *, of: str = "") -> Object:
    """`of` is the one job that the object belongs to."""
    marks = labels(of) if of else {"app.kubernetes.io/name": "quotesmith"}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": marks}}
