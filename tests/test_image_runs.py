"""The image, built and run: the whole toy job as process 1 with no rights at all, stopped, misled, and as each platform
starts it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests import hub_server
from tests.containers import (
    DEMANDED,
    RESTRICTED,
    ROOT,
    USER,
    VERSION,
    Engine,
    built,
    folder_of,
    missing,
    mounted,
    variables,
)
from tests.test_job import QUOTES, write_bucket

pytestmark = [
    pytest.mark.slow,
    pytest.mark.image,
    pytest.mark.skipif(bool(missing()) and DEMANDED != "1", reason=missing()),
]
# Little work: what is tried is how the job is started, stopped and told what to do. One job has our encoder.
TOY = {
    "train.max_steps": "2",
    "calibration.generated": "8",
    "calibration.max_tokens": "2000",
    "recover.steps": "2",
    "quantize.encoder": "llama.cpp",
    "adapt.steps": "2",
    "finish.steps": "2",
    "evaluate.max_quotes": "10",
    "evaluate.prompts": "I",
    "evaluate.samples": "1",
    "evaluate.max_new_tokens": "8",
}
RELEASE = {"gpt2-ye-trump-Q2_K.gguf", "metrics.json", "README.md", "Modelfile", "latest.json", "runs"}
MOUNTS = {"/etc"}  # where the engine itself mounts names of hosts
ANYBODY = 54321
STOPS = ("finetune", "sparsify", "finish")
HOSTS = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "eth0"}


def env_of(settings):
    return {f"QUOTESMITH_{key.upper().replace('.', '_')}": value for key, value in settings.items()}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return built(tmp_path_factory.mktemp("build"))


@pytest.fixture
def podman(image):
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture
def readable(tmp_path_factory, toy_gpt2):
    """A copy of the toy model, and quotes, that any user may read."""
    folder = tmp_path_factory.mktemp("readable")
    shutil.copytree(toy_gpt2, folder / "model")
    (folder / "quotes").mkdir()
    write_bucket(str(folder / "quotes"), QUOTES, tmp_path_factory.mktemp("written"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def job(readable, tmp_path, user=USER, **settings):
    """Options of a container that runs the toy job with nothing but its mounts."""
    out, work = (folder_of(user, tmp_path / name) for name in ("out", "work"))
    places = {"input": "/data/in/quotes/", "model.base": "/data/in/model", "output": "/data/out", "work_dir": "/work"}
    options = [*RESTRICTED, "--user", f"{user}:{user}", *mounted((readable, "/data/in"), read_only=True)]
    options += mounted((out, "/data/out"), (work, "/work"))
    return [*options, *variables(env_of({**TOY, **places, **settings}))]


def assert_published(done, tmp_path):
    assert done.code == 0, done.said
    assert {path.name for path in (tmp_path / "out").iterdir()} >= RELEASE
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["ledger"][-1]["stage"] == "finished"
    assert set(done.changed()) <= {*MOUNTS, "/data", "/data/in", "/data/out"}


def test_the_whole_job_runs_with_no_rights_and_no_network(podman, image, readable, tmp_path):
    options = job(readable, tmp_path, **{"quantize.encoder": "gptq"})
    assert_published(podman.run(image, "run", options=options), tmp_path)


def test_a_job_of_any_user_that_is_stopped_ends_with_143_and_goes_on_where_it_was(podman, image, readable, tmp_path):
    options = job(readable, tmp_path, ANYBODY, **{"train.max_steps": "20", "grace_seconds": "100"})
    for number, stage in enumerate(STOPS):
        begun = podman.start(image, "run", options=options)
        begun.wait_for(f"{stage}: started")
        stopped = begun.stop()
        assert stopped.code == 143, stopped.said
        assert "the same command goes on" in stopped.said and "Traceback" not in stopped.said
        assert all(f"{done}: already done" in stopped.said for done in STOPS[: max(0, number - 1)]), stopped.said
        assert ("finetune: goes on from its checkpoint at step" in stopped.said) == (number == 1)
        assert not (tmp_path / "out" / "latest.json").exists()
    last = podman.run(image, "run", options=options)
    assert "quantize: already done" in last.said and (tmp_path / "out" / "latest.json").exists()
    assert_published(last, tmp_path)


def test_a_wrong_setting_ends_with_78_and_its_sentence_in_the_termination_log(podman, image, tmp_path):
    log = tmp_path / "termination-log"
    log.touch()
    log.chmod(0o666)
    options = [*RESTRICTED, *mounted((log, "/dev/termination-log")), *variables({"QUOTESMITH_TRAIN_EPOCHS": "0"})]
    done = podman.run(image, "run", options=options)
    assert done.code == 78 and "Traceback" not in done.said
    assert "train.epochs is '0'" in log.read_text() and log.read_text().strip() in done.said


def test_the_image_says_that_it_can_work_and_what_it_is_made_of(podman, image):
    watched = variables({"PYTHONVERBOSE": "1"})
    done = podman.run(image, "--self-test", options=[*RESTRICTED, *watched, "--tmpfs", "/work:mode=1777"])
    assert done.code == 0, done.out + done.said
    assert re.search("code object from '/opt/venv/.*torch.*pyc'", done.said)
    assert not re.findall(r"code object from '(.*\.py)'", done.said), "compiled at its start"
    (made,) = json.loads(podman("image", "inspect", image).stdout)
    revision = made["Labels"]["org.opencontainers.image.revision"]
    assert f"{VERSION}, revision {revision}" in done.out and "a job can run here" in done.out
    assert made["User"] == f"{USER}:{USER}" and made["Labels"]["org.opencontainers.image.version"] == VERSION


def test_the_bill_of_materials_is_that_of_the_lock_and_of_debians_packages(podman, image):
    script = ROOT / "scripts/sbom.py"
    made = subprocess.run(
        [sys.executable, script, "--variant", "cpu", image], env=podman.env(), capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    found = {each["purl"].split("@")[0] for each in json.loads(made.stdout)["components"]}
    assert {"pkg:pypi/torch", "pkg:pypi/llama-cpp-python", "pkg:deb/debian/libc6"} <= found


def test_llama_cpp_has_code_for_every_generation_of_cpus(podman, image):
    script = "import os; print(*sorted(os.listdir('/opt/llama.cpp/bin')))"
    listed = podman.run(image, "-c", script, options=[*RESTRICTED, "--entrypoint", "/opt/venv/bin/python"])
    names = listed.out.split()
    assert {"libggml-cpu-x64.so", "libggml-cpu-sse42.so", "libggml-cpu-haswell.so", "libggml-cpu-zen4.so"} <= set(names)
    assert {"llama-quantize", "llama-bench", "llama-probe"} <= set(names)


def test_the_image_has_no_compiler_no_pip_and_no_settings_of_the_build(podman, image):
    programs = ("cc", "c++", "gcc", "g++", "make", "cmake", "git", "pip")
    script = (
        f"import shutil, os; print([p for p in {programs} if shutil.which(p)], [n for n in os.environ if 'PIP' in n])"
    )
    script += "; print(os.path.exists('/etc/pip.conf') and open('/etc/pip.conf').read())"
    done = podman.run(image, "-c", script, options=[*RESTRICTED, "--entrypoint", "/opt/venv/bin/python"])
    assert done.out.splitlines() == ["[] []", "False"], done.said


@pytest.fixture(scope="module")
def sagemaker(image, tmp_path_factory):
    return built(tmp_path_factory.mktemp("sagemaker"), "sagemaker")


@pytest.fixture
def training_job(readable, tmp_path):
    """/opt/ml as SageMaker makes it; all hyperparameters are text."""
    ml = tmp_path / "ml"
    for folder in ("input/config", "input/data", "model", "output/data", "checkpoints"):
        (ml / folder).mkdir(parents=True)
    shutil.copytree(readable / "quotes", ml / "input/data/quotes")
    shutil.copytree(readable / "model", ml / "input/data/model")
    channel = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
    files = {"hyperparameters": TOY, "inputdataconfig": dict.fromkeys(("quotes", "model"), channel)}
    for name, content in {**files, "resourceconfig": HOSTS}.items():
        (ml / "input/config" / f"{name}.json").write_text(json.dumps(content))
    return ml


def test_sagemaker_finds_its_result_where_it_looks_for_it(podman, sagemaker, training_job):
    done = podman.run(
        sagemaker, "train", options=["--network", "none", "--shm-size", "64m", *mounted((training_job, "/opt/ml"))]
    )
    assert done.code == 0, done.said
    assert {path.name for path in (training_job / "model").iterdir()} >= RELEASE
    assert list((training_job / "output/tensorboard").rglob("events.out.tfevents*"))
    assert not (training_job / "output/failure").exists()
    # the work folder, and one that PyTorch makes and leaves empty
    changed = {path for path in done.changed() if not re.match("/tmp/quotesmith|/tmp/torchinductor_quotesmith$", path)}
    assert changed <= {*MOUNTS, "/opt", "/opt/ml", "/tmp"}


def test_sagemaker_is_told_why_a_job_failed(podman, sagemaker, training_job):
    shutil.rmtree(training_job / "input/data/quotes")
    (training_job / "input/data/quotes").mkdir()
    (training_job / "input/data/quotes/quotes.txt").write_bytes(b"\x00\xff\xfe" * 100)
    done = podman.run(sagemaker, "train", options=["--network", "none", *mounted((training_job, "/opt/ml"))])
    assert done.code == 65 and "Traceback" not in done.said
    failure = (training_job / "output/failure").read_text()
    assert "quotes.txt" in failure and len(failure) <= 1024 and failure.strip() in done.said


def test_vertex_ai_finds_the_release_in_its_bucket(podman, image, readable, gcs_server, gcs_bucket_uri, tmp_path):
    from pipeline import publish

    write_bucket(f"{gcs_bucket_uri}/in", QUOTES, tmp_path)
    cluster = {"cluster": {"workerpool0": ["127.0.0.1:2222"]}, "task": {"type": "workerpool0", "index": 0}}
    vertex = {
        "AIP_MODEL_DIR": f"{gcs_bucket_uri}/out/model/",
        "AIP_CHECKPOINT_DIR": f"{gcs_bucket_uri}/out/checkpoints/",
        "AIP_TENSORBOARD_LOG_DIR": f"{gcs_bucket_uri}/out/logs/",
        "CLOUD_ML_JOB_ID": "123",
        "CLUSTER_SPEC": json.dumps({**cluster, "environment": "cloud", "job": "{}"}),
        "STORAGE_EMULATOR_HOST": gcs_server,
    }
    settings = env_of({**TOY, "input": f"{gcs_bucket_uri}/in/", "model.base": "/data/in/model"})
    options = [*RESTRICTED[: RESTRICTED.index("--network")], "--network", "host", "--tmpfs", "/work:mode=1777"]
    options += [*mounted((readable, "/data/in"), read_only=True), *variables({**settings, **vertex})]
    done = podman.run(image, "run", options=options)
    assert done.code == 0, done.said
    assert publish.verify(f"{gcs_bucket_uri}/out/model")


def test_two_workers_of_vertex_ai_train_together(podman, image, readable, gcs_server, gcs_bucket_uri, tmp_path):
    from pipeline import publish
    from pipeline.storage import open_store
    from pipeline.team import free_port

    write_bucket(f"{gcs_bucket_uri}/in", QUOTES, tmp_path)
    pools = {"workerpool0": [f"127.0.0.1:{free_port()}"], "workerpool1": ["127.0.0.1:2222"]}
    settings = env_of({**TOY, "input": f"{gcs_bucket_uri}/in/", "model.base": "/data/in/model"})
    options = [*RESTRICTED[: RESTRICTED.index("--network")], "--network", "host", "--tmpfs", "/work:mode=1777"]
    options += mounted((readable, "/data/in"), read_only=True)
    workers = []
    for pool in pools:
        spec = {"cluster": pools, "environment": "cloud", "task": {"type": pool, "index": 0}, "job": "{}"}
        vertex = {"AIP_MODEL_DIR": f"{gcs_bucket_uri}/out/model/", "CLUSTER_SPEC": json.dumps(spec)}
        env = {**settings, **vertex, "STORAGE_EMULATOR_HOST": gcs_server}
        workers.append(podman.start(image, "run", options=[*options, *variables(env)]))
    first, second = (worker.ended() for worker in workers)
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert "this machine's part" in second.said
    stages = json.loads(open_store(f"{gcs_bucket_uri}/out/model").read("metrics.json"))["stages"]
    assert next(stage for stage in stages if stage["name"] == "finetune")["facts"]["processes"] == 2
    assert publish.verify(f"{gcs_bucket_uri}/out/model")


@pytest.fixture
def with_model(image, toy_gpt2, tmp_path):
    """The image with a model inside; the toy is what a server like the hub gives out as GPT-2."""
    with hub_server.serving(toy_gpt2) as address:
        return built(tmp_path, "with-model", HF_ENDPOINT=address)


def test_a_pod_runs_from_the_manifest_that_render_prints(podman, with_model, gcs_server, gcs_bucket_uri, tmp_path):
    """`podman kube play` knows pods and ConfigMaps, so the Job's pod is taken out of it; all else is as printed."""
    from pipeline import publish
    from pipeline.render import Request, job_of, render
    from pipeline.settings import resolve

    write_bucket(f"{gcs_bucket_uri}/in", QUOTES, tmp_path)
    flags = {**TOY, "input": f"{gcs_bucket_uri}/in/", "output": f"{gcs_bucket_uri}/out"}
    request = Request(image=with_model, gpus=0, cpus=1, memory_gib=4, disk_gib=4)
    objects = list(yaml.safe_load_all(render("k8s", job_of(resolve(flags, {}), request))))
    (settings,) = (each for each in objects if each["kind"] == "ConfigMap")
    (template,) = (each["spec"]["template"] for each in objects if each["kind"] == "Job")
    name = f"toy-{tmp_path.name.replace('_', '-')}"[:40]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **template["metadata"]}}
    pod["spec"] = template["spec"]
    # The local bucket server stands for the cloud, and only the node's network reaches it.
    pod["spec"]["hostNetwork"] = True
    (container,) = pod["spec"]["containers"]
    container["env"].append({"name": "STORAGE_EMULATOR_HOST", "value": gcs_server})
    manifest = tmp_path / "pod.yaml"
    manifest.write_text(yaml.safe_dump_all([settings, pod]))
    podman.pods.append(str(manifest))
    podman("kube", "play", "--network", "host", str(manifest))
    code = podman("wait", f"{name}-quotesmith").stdout.strip()
    assert code == "0", podman("logs", f"{name}-quotesmith").stderr
    assert publish.verify(f"{gcs_bucket_uri}/out")
