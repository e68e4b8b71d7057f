"""Writes the manifests of k8s/ that `render` makes too, from the same functions."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.render import Job, Request, job_of, k8s, trainjob  # noqa: E402
from pipeline.settings import resolve  # noqa: E402

NAME = "quotesmith"
NOTE = "# Made by scripts/update_k8s.py; change pipeline/render/ or patch this in an overlay.\n"


def example(**request: int) -> Job:
    return job_of(resolve({"output": "gs://my-bucket/models/"}, {}), Request(**request))


def manifests() -> dict[str, str]:
    """What belongs into k8s/, by path."""
    one, two = example(), example(nodes=2)
    objects = {
        "base/service-account.yaml": [k8s.service_account(one)],
        "base/network-policy.yaml": [k8s.network_policy(one, NAME)],
        "base/job.yaml": k8s.workload(one, NAME),
        "overlays/indexed-job/service.yaml": [k8s.service(NAME)],
        "overlays/jobset/jobset.yaml": [k8s.job_set(two, NAME)],
        "overlays/trainjob/trainjob.yaml": trainjob.train_job(two, NAME),
    }
    return {path: NOTE + k8s.as_yaml(each) for path, each in objects.items()}


if __name__ == "__main__":
    for path, text in manifests().items():
        (ROOT / "k8s" / path).write_text(text, encoding="utf-8")
