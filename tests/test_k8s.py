"""The manifests, those in k8s/ and those that `render` prints: strictly by the schemas, and for what no schema sees."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import entrypoint
from pipeline.errors import no_retry_helps
from pipeline.render import Request, job_of, k8s, render
from pipeline.settings import CONFIG_ENV, all_settings, resolve

ROOT = Path(entrypoint.__file__).parent
sys.path.insert(0, str(ROOT / "scripts"))

from update_k8s import manifests  # noqa: E402

OVERLAYS = sorted(path.parent.name for path in (ROOT / "k8s" / "overlays").glob("*/kustomization.yaml"))
FOLDERS = ["base", *(f"overlays/{name}" for name in OVERLAYS)]
RENDERED = ["k8s", "k8s --nodes 2", "k8s --gpus 0", "trainjob"]
VERSIONS = ["1.31", "1.37"]  # podFailurePolicy is stable since the first; the newest that the checker knows
BUCKETS = {"input": ["gs://my-bucket/quotes/"], "output": "gs://my-bucket/models/", "train.epochs": "3"}
SCHEMAS = {
    "JobSet": "jobset_v1alpha2_job_set.JobsetV1alpha2JobSet",
    "TrainJob": "trainer_v1alpha1_train_job.TrainerV1alpha1TrainJob",
    "TrainingRuntime": "trainer_v1alpha1_training_runtime.TrainerV1alpha1TrainingRuntime",
}


def kubectl():
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    return found or pytest.skip("no kubectl; the extra `dev` brings one")


@cache
def built(folder):
    return kustomized(ROOT / "k8s" / folder)


def kustomized(folder):
    done = subprocess.run(
        [kubectl(), "kustomize", folder], capture_output=True, text=True, env={"HOME": "/nonexistent"}
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def printed(command):
    platform, *options = command.split()
    request = {name.removeprefix("--"): int(value) for name, value in zip(options[::2], options[1::2], strict=True)}
    return list(yaml.safe_load_all(render(platform, job_of(resolve(BUCKETS, {}), Request(**request)))))


def objects_of(source):
    return built(source) if source in FOLDERS else printed(source)


everything = pytest.mark.parametrize("source", [*FOLDERS, *RENDERED])


def kind(objects, *names):
    return [each for each in objects if each["kind"] in names]


def job_specs(objects):
    """(job spec, name of the object it is in) of Jobs, JobSets and TrainingRuntimes."""
    for each in kind(objects, "Job"):
        yield each["spec"], each["metadata"]["name"]
    for each in kind(objects, "JobSet", "TrainingRuntime"):
        jobs = each["spec"] if each["kind"] == "JobSet" else each["spec"]["template"]["spec"]
        for group in jobs["replicatedJobs"]:
            yield group["template"]["spec"], each["metadata"]["name"]


def only_job(objects):
    ((spec, name),) = job_specs(objects)
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    return spec, name, pod, container


@pytest.mark.parametrize("path", sorted(manifests()))
def test_what_the_repository_has_is_what_render_makes(path):
    made = (ROOT / "k8s" / path).read_text(encoding="utf-8")
    assert made == manifests()[path], "run scripts/update_k8s.py"


@pytest.mark.parametrize(("folder", "nodes"), [("base", 1), ("overlays/indexed-job", 2)])
def test_what_kustomize_builds_is_what_render_prints(folder, nodes):
    given = {key: BUCKETS[key] for key in ("input", "output")}
    job = job_of(resolve(given, {}), Request(nodes=nodes))
    asked = [*k8s.surroundings(job, "quotesmith"), *k8s.workload(job, "quotesmith")]
    assert by_name(built(folder)) == by_name(asked)


def by_name(objects):
    """Objects by kind and name. kustomize's ConfigMap has no labels; a list may be one line or JSON."""
    found = {(each["kind"], each["metadata"]["name"]): each for each in json.loads(json.dumps(objects))}
    settings = found[("ConfigMap", "quotesmith-settings")]
    settings["metadata"].pop("labels", None)
    settings["data"] = resolve({}, settings["data"]).config.model_dump(mode="json")
    for each in found.values():
        for env in nested(each, "env"):
            env.sort(key=lambda variable: variable["name"])
    return found


def nested(value, key):
    if isinstance(value, dict):
        for name, each in value.items():
            if name == key:
                yield each
            yield from nested(each, key)
    elif isinstance(value, list):
        for each in value:
            yield from nested(each, key)


@everything
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(source, version):
    validate = pytest.importorskip("kubernetes_validate").validate
    for each in objects_of(source):
        if each["kind"] not in SCHEMAS:
            validate(each, version, strict=True)
    for spec, _ in job_specs(objects_of(source)):  # inside of a JobSet or a runtime too
        validate(job_like(spec), version, strict=True)


def job_like(spec):
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}


@everything
def test_jobset_and_trainer_know_every_field(source):
    for each in kind(objects_of(source), *SCHEMAS):
        assert unknown(each) == []


def unknown(custom):
    """What the schema of a JobSet, a TrainJob or a TrainingRuntime does not have."""
    pytest.importorskip("kubeflow_trainer_api")
    module, name = SCHEMAS[custom["kind"]].split(".")
    model = getattr(import_module(f"kubeflow_trainer_api.models.{module}"), name)
    return missing(custom, model.from_dict(custom).to_dict())


@pytest.mark.parametrize("source", ["base", "overlays/jobset", "overlays/trainjob"])
def test_the_checks_of_fields_find_a_wrong_one(source):
    validator = pytest.importorskip("kubernetes_validate")
    objects = copy.deepcopy(objects_of(source))
    spec, *_, container = only_job(objects)
    container["imagePullPolice"] = "Always"
    with pytest.raises(validator.ValidationError):
        validator.validate(job_like(spec), VERSIONS[0], strict=True)
    for each in kind(objects, "JobSet", "TrainingRuntime"):
        assert [path.rpartition(".")[2] for path in unknown(each)] == ["imagePullPolice"]


def missing(given, read, path=""):
    """Paths of what was given and is not in what was read: from_dict passes over fields that it does not know."""
    if isinstance(given, dict) and isinstance(read, dict):
        gone = [f"{path}.{key}" for key in given if key not in read]
        return gone + [each for key in given if key in read for each in missing(given[key], read[key], f"{path}.{key}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [each for i, pair in enumerate(zip(given, read, strict=True)) for each in missing(*pair, f"{path}[{i}]")]
    return [] if str(given) == str(read) or (given == {} and not read) else [f"{path}: {given!r} is read as {read!r}"]


@everything
def test_failures_are_judged_by_our_exit_codes(source):
    spec, _, pod, container = only_job(objects_of(source))
    assert pod["restartPolicy"] == "Never" and spec["podReplacementPolicy"] == "Failed"
    disruption, no_retry = spec["podFailurePolicy"]["rules"]
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    codes = no_retry["onExitCodes"]
    assert (no_retry["action"], codes["operator"], codes["values"]) == ("FailJob", "In", no_retry_helps())
    assert codes["containerName"] == container["name"]
    alone = bool(kind(objects_of(source), "Job"))
    assert disruption["action"] == ("Ignore" if alone else "FailJob")  # a set starts anew as a whole
    assert (spec["backoffLimit"] > 0) == alone and spec["activeDeadlineSeconds"] > 0


@everything
def test_pods_keep_the_rules_of_restricted_pod_security(source):
    _, _, pod, container = only_job(objects_of(source))
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    own = container["securityContext"]
    assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}
    assert own["readOnlyRootFilesystem"] is True and "privileged" not in own
    assert not [port for port in container.get("ports", []) if "hostPort" in port]
    assert all(set(volume) - {"name"} == {"emptyDir"} for volume in pod["volumes"])
    assert pod["automountServiceAccountToken"] is False


@everything
def test_mounts_accounts_and_settings_that_are_named_exist(source):
    objects = objects_of(source)
    _, _, pod, container = only_job(objects)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {"/work", "/tmp", "/dev/shm"} == {mount["mountPath"] for mount in container["volumeMounts"]}
    assert container["workingDir"] == "/work"
    assert [each["metadata"]["name"] for each in kind(objects, "ServiceAccount")] == [pod["serviceAccountName"]]
    (settings,) = kind(objects, "ConfigMap")
    by_ref = [each["configMapRef"]["name"] for each in container["envFrom"] if "configMapRef" in each]
    assert by_ref == [settings["metadata"]["name"]]


@everything
def test_every_environment_name_is_a_setting_and_every_value_can_be_read(source):
    objects = objects_of(source)
    _, _, pod, container = only_job(objects)
    (settings,) = kind(objects, "ConfigMap")
    env = settings["data"] | {each["name"]: each["value"] for each in container["env"]}
    known = {setting.env for setting in all_settings()} | {CONFIG_ENV}
    others = set(env) - known
    assert others in (set(), {"NNODES", "MASTER_ADDR", "MASTER_PORT"})
    config = resolve({}, {name: value for name, value in env.items() if name in known}).config
    assert config.grace_seconds == pod["terminationGracePeriodSeconds"]
    assert config.output.startswith(("gs://", "s3://"))


@everything
def test_a_pod_that_follows_a_killed_one_waits_until_its_lease_is_over(source):
    (settings,) = kind(objects_of(source), "ConfigMap")
    lease = resolve({}, settings["data"]).config.lease
    assert lease.seconds < lease.wait_seconds < lease.seconds + 60


@pytest.mark.parametrize("platform", ["k8s", "trainjob"])
@pytest.mark.parametrize(("given", "waits"), [({"lease.seconds": "600"}, 615), ({"lease.wait_seconds": "0"}, 0)])
def test_the_wait_for_a_lease_follows_the_settings(platform, given, waits):
    objects = list(yaml.safe_load_all(render(platform, job_of(resolve(BUCKETS | given, {}), Request()))))
    (settings,) = kind(objects, "ConfigMap")
    assert resolve({}, settings["data"]).config.lease.wait_seconds == waits


@everything
def test_resources_are_bounded_and_cover_the_volumes(source):
    _, _, pod, container = only_job(objects_of(source))
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert {"cpu", "memory", "ephemeral-storage"} <= set(requests) and {"memory", "ephemeral-storage"} <= set(limits)
    sizes = {volume["name"]: int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) for volume in pod["volumes"]}
    assert sizes["work"] + sizes["tmp"] <= int(requests["ephemeral-storage"].removesuffix("Gi"))
    assert container["terminationMessagePath"] == "/dev/termination-log"
    if source == "k8s --gpus 0":
        assert "nvidia.com/gpu" not in limits and "tolerations" not in pod
    else:
        assert limits["nvidia.com/gpu"] == requests["nvidia.com/gpu"] == "1"


@everything
def test_the_network_policy_holds_for_the_pods_and_lets_out_what_they_need(source):
    objects = objects_of(source)
    spec, *_ = only_job(objects)
    (policy,) = kind(objects, "NetworkPolicy")
    labels = spec["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])}
    assert {53, 443} <= ports
    aws = source == "overlays/eks-irsa"
    assert (k8s.METADATA in policy["spec"]["egress"]) != aws and ({80, 988} <= ports) != aws
    several = spec.get("parallelism", 1) > 1 or (bool(kind(objects, "TrainJob")) and source != "trainjob")
    assert bool(policy["spec"]["ingress"]) == several
    for rule in policy["spec"]["ingress"]:
        assert [each["podSelector"]["matchLabels"].items() <= labels.items() for each in rule["from"]] == [True]


@everything
def test_settings_cannot_change_under_a_job_that_is_there(source):
    assert [each["immutable"] for each in kind(objects_of(source), "ConfigMap")] == [True]


def test_a_job_without_a_bucket_of_google_does_not_reach_for_its_tokens():
    job = job_of(resolve({"input": "s3://b/in", "output": "s3://b/out"}, {}), Request())
    (policy,) = kind(list(yaml.safe_load_all(render("k8s", job))), "NetworkPolicy")
    assert [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]] == [53, 53, 443]


def test_two_jobs_in_one_namespace_share_nothing_but_the_account():
    names = []
    for name in ("one", "two"):
        job = job_of(resolve({**BUCKETS, "name": name}, {}), Request(nodes=2))
        names.append({(each["kind"], each["metadata"]["name"]) for each in yaml.safe_load_all(render("k8s", job))})
    assert names[0] & names[1] == {("ServiceAccount", "quotesmith")}


@pytest.mark.parametrize("source", ["overlays/indexed-job", "k8s --nodes 2"])
def test_the_nodes_of_an_indexed_job_find_the_first(source):
    objects = objects_of(source)
    spec, name, pod, container = only_job(objects)
    (service,) = kind(objects, "Service")
    env = {each["name"]: each["value"] for each in container["env"]}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == int(env["NNODES"]) == 2
    assert env["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()


def test_the_nodes_of_a_jobset_find_the_first():
    (job_set,) = kind(built("overlays/jobset"), "JobSet")
    *_, container = only_job(built("overlays/jobset"))
    env = {each["name"]: each["value"] for each in container["env"]}
    name, group = job_set["metadata"]["name"], job_set["spec"]["replicatedJobs"][0]["name"]
    assert env["MASTER_ADDR"] == f"{name}-{group}-0-0.{name}" and job_set["spec"]["network"]["enableDNSHostnames"]


def test_the_trainer_finds_its_node():
    objects = built("overlays/trainjob")
    (job,), (runtime,) = kind(objects, "TrainJob"), kind(objects, "TrainingRuntime")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    group = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
    assert group["name"] == group["template"]["spec"]["template"]["spec"]["containers"][0]["name"] == "node"
    step = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert group["template"]["metadata"]["labels"] == step
    assert runtime["spec"]["mlPolicy"]["numNodes"] == job["spec"]["trainer"]["numNodes"] == 2


@pytest.mark.parametrize("folder", ["overlays/jobset", "overlays/trainjob"])
def test_a_set_ends_where_no_retry_helps_and_starts_anew_after_a_disruption(folder):
    (each,) = kind(built(folder), "JobSet", "TrainingRuntime")
    spec = each["spec"] if each["kind"] == "JobSet" else each["spec"]["template"]["spec"]
    rules = spec["failurePolicy"]["rules"]

    def action(reason, message):
        for rule in rules:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
        return "RestartJobSet"  # the default, which counts

    # What the Job controller writes (pkg/controller/job/pod_failure_policy.go).
    disrupted = "Pod default/quotesmith-0 has condition DisruptionTarget matching FailJob rule at index 0"
    ended = (
        "Container quotesmith for pod default/quotesmith-0 failed with exit code 78 matching FailJob rule at index 1"
    )
    assert action("PodFailurePolicy", disrupted) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action("PodFailurePolicy", ended) == "FailJobSet"
    assert action("DeadlineExceeded", "Job was active longer than specified deadline") == "FailJobSet"
    assert action("BackoffLimitExceeded", "Job has reached the specified backoff limit") == "RestartJobSet"
    assert all(re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]) for rule in rules)


def test_overlays_say_who_the_pod_is_and_where_it_goes():
    def annotations(folder):
        return kind(built(folder), "ServiceAccount")[0]["metadata"].get("annotations", {})

    assert "iam.gke.io/gcp-service-account" in annotations("overlays/gke-workload-identity")
    assert "eks.amazonaws.com/role-arn" in annotations("overlays/eks-irsa")
    _, _, pod, _ = only_job(built("overlays/gke-spot"))
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and pod["terminationGracePeriodSeconds"] == 15
    assert {"cloud.google.com/gke-spot", "nvidia.com/gpu"} == {each["key"] for each in pod["tolerations"]}
    (job,) = kind(built("overlays/kueue"), "Job")
    assert job["spec"]["suspend"] and job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_kustomization_of_ones_own_sets_image_settings_and_namespace(folder, tmp_path):
    own = {
        "resources": [os.path.relpath(ROOT / "k8s" / folder, tmp_path.resolve())],
        "namespace": "voices",
        "images": [{"name": "quotesmith", "newName": "registry/quotesmith", "newTag": "1"}],
        "configMapGenerator": [
            {"name": "quotesmith-settings", "behavior": "merge", "literals": ["QUOTESMITH_OUTPUT=gs://mine"]}
        ],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(own))
    objects = kustomized(tmp_path)
    *_, container = only_job(objects)
    assert container["image"] == "registry/quotesmith:1"
    (settings,) = kind(objects, "ConfigMap")
    assert settings["data"]["QUOTESMITH_OUTPUT"] == "gs://mine" and "QUOTESMITH_INPUT" in settings["data"]
    assert {each["metadata"]["namespace"] for each in objects} == {"voices"}


@pytest.mark.parametrize(
    ("identity", "annotation"),
    [
        ("arn:aws:iam::123456789012:role/quotesmith", "eks.amazonaws.com/role-arn"),
        ("me@project.iam.gserviceaccount.com", "iam.gke.io/gcp-service-account"),
    ],
)
def test_an_identity_is_annotated_as_its_cloud_reads_it(identity, annotation):
    job = job_of(resolve(BUCKETS, {}), Request(identity=identity))
    (account,) = kind(list(yaml.safe_load_all(render("k8s", job))), "ServiceAccount")
    assert account["metadata"]["annotations"] == {annotation: identity}
