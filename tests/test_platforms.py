"""What each platform puts into a container, and what it reads back: its own files and variables, the whole command
line. A root folder of each test's own stands for the container's."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

import entrypoint
from pipeline import platforms, signals
from pipeline.errors import ConfigError
from pipeline.options import Door
from pipeline.platforms import Nodes
from pipeline.redact import LONGEST_SENTENCE
from pipeline.settings import resolve

ROOT = Path(entrypoint.__file__).parent
COMMAND = "import sys, pathlib, entrypoint; entrypoint.main(pathlib.Path(sys.argv.pop(1)))"
FOREIGN = ("KUBERNETES_", "AIP_", "CLUSTER_SPEC", "CLOUD_ML", "PET_", "QUOTESMITH_", "NNODES", "MASTER_")
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
CLUSTER = {
    "cluster": {"workerpool0": ["training-workerpool0-ab-0:2222"], "workerpool1": ["training-workerpool1-ab-0:2222"]},
    "environment": "cloud",
    "task": {"type": "workerpool1", "index": 0},
    "job": '{"python_module":"","package_uris":[],"job_args":[]}',
}
VERTEX = {
    "AIP_MODEL_DIR": "gs://bucket/out/model/",
    "AIP_CHECKPOINT_DIR": "gs://bucket/out/checkpoints/",
    "AIP_TENSORBOARD_LOG_DIR": "gs://bucket/out/logs/",
    "CLOUD_ML_JOB_ID": "123",
    "CLUSTER_SPEC": json.dumps({**CLUSTER, "cluster": {"workerpool0": ["a:2222"]}}),
}


def environment(more):
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | (more or {})


def command(root, *args, env=None):
    """The command line in this process, with `root` for its file system."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, environment(env), clear=True),
        patch.object(signals.state, "grace_seconds", 10.0),
        patch.object(logging.getLogger(), "handlers", []),
        chdir(root),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        door = Door(platforms.find(os.environ, root))
        code = entrypoint.exit_code_of(lambda: entrypoint.cli(args, standalone_mode=False, obj=door), door.platform)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def origins(done):
    assert done.returncode == 0, done.stderr
    return {row["key"]: (row["value"], row["origin"]) for row in json.loads(done.stdout)}


@pytest.fixture
def pod(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/termination-log").touch()
    return tmp_path


@pytest.fixture
def training_job(tmp_path):
    """Writes /opt/ml as SageMaker does."""

    def write(hyperparameters=None, channels=("quotes",), hosts=("algo-1",), this="algo-1"):
        ml = tmp_path / "opt/ml"
        for folder in ("input/config", "model", "output/data", "checkpoints"):
            (ml / folder).mkdir(parents=True)
        for channel in channels:
            (ml / "input/data" / channel).mkdir(parents=True)
        channel = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
        files = {
            "hyperparameters.json": hyperparameters or {},
            "inputdataconfig.json": dict.fromkeys(channels, channel),
            "resourceconfig.json": {
                "current_host": this,
                "current_instance_type": "ml.g5.xlarge",
                "current_group_name": "homogeneousCluster",
                "hosts": list(hosts),
                "network_interface_name": "eth0",
            },
        }
        for name, content in files.items():
            (ml / "input/config" / name).write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({}, "this machine"),
        (POD, "Kubernetes"),
        (POD | {"PET_NNODES": "1"}, "Kubeflow Trainer"),
        (VERTEX, "Vertex AI"),
        ({"CLUSTER_SPEC": "{}"}, "Vertex AI"),
    ],
)
def test_a_platform_is_known_by_its_variables(env, name, tmp_path):
    assert platforms.find(env, tmp_path).name == name


def test_sagemaker_is_known_by_its_files_and_a_pod_by_its_termination_log(training_job, pod):
    assert platforms.find({}, pod).name == "Kubernetes"
    assert platforms.find({}, training_job()).name == "SageMaker"


def test_where_nothing_is_given_nothing_changes(tmp_path):
    assert resolve({}, {}, None, platforms.find({}, tmp_path)) == resolve({}, {})


def test_sagemaker_says_everything_in_its_files(training_job):
    given = {"train.epochs": "3", "quantize.types": '["Q2_K", "Q4_0"]', "sagemaker_program": '"train.py"'}
    root = training_job(given, channels=("quotes", "model", "more-quotes", "calibration"))
    found = origins(command(root, "config", "--json"))
    assert found["train.epochs"] == (3.0, "hyperparameter train.epochs")
    assert found["quantize.types"][0] == ["Q2_K", "Q4_0"]
    data = f"{root}/opt/ml/input/data"
    assert found["input"] == ([f"{data}/more-quotes", f"{data}/quotes"], "SageMaker channel more-quotes, quotes")
    assert found["model.base"] == (f"{data}/model", "SageMaker channel model")
    assert found["calibration.text"][0] == f"{data}/calibration"
    assert found["output"] == (f"{root}/opt/ml/model", "SageMaker's /opt/ml/model")
    assert found["resume.uri"][0] == f"{root}/opt/ml/checkpoints" and found["resume.upload"][0] == "always"
    assert found["tensorboard"] == (f"{root}/opt/ml/output/tensorboard", "SageMaker's /opt/ml/output/tensorboard")
    assert found["grace_seconds"][0] == 120
    assert found["seed"] == (42, "default")


def test_a_flag_beats_a_hyperparameter_beats_the_environment_beats_the_file_beats_sagemakers_paths(training_job):
    root = training_job({"train.epochs": "3", "train.batch_size": "3", "--sparsity.keep-zeros": "True"})
    (root / "job.yaml").write_text("output: s3://bucket/out\nname: mine\n")
    env = {"QUOTESMITH_TRAIN_BATCH_SIZE": "4", "QUOTESMITH_SEED": "4", "QUOTESMITH_NAME": "voice"}
    found = origins(command(root, "config", "--json", "--train.epochs", "5", "--config", "job.yaml", env=env))
    assert found["train.epochs"] == (5, "flag --train.epochs")
    assert found["train.batch_size"] == (3, "hyperparameter train.batch_size")
    assert found["sparsity.keep_zeros"] == (True, "hyperparameter --sparsity.keep-zeros")
    assert found["name"] == ("voice", "environment QUOTESMITH_NAME")
    assert found["output"] == ("s3://bucket/out", "file job.yaml")


def test_values_as_the_python_sdk_encodes_them_are_read(training_job):
    root = training_job({"sparsity.method": '"wanda"', "recover.steps": "0", "name": "0042"})
    config = resolve({}, {}, None, platforms.find({}, root)).config
    assert (config.sparsity.method, config.recover.steps, config.name) == ("wanda", 0, "0042")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("hyperparameters.json", '{"train.epoch": "3"}', "from SageMaker: train.epoch; did you mean train.epochs?"),
        ("hyperparameters.json", '{"train.epochs": "0"}', "train.epochs is '0' (hyperparameter train.epochs)"),
        ("hyperparameters.json", "[1]", "holds a list"),
        ("hyperparameters.json", "{", "not valid JSON"),
        ("inputdataconfig.json", '{"quotes": {"TrainingInputMode": "Pipe"}}', "TrainingInputMode Pipe"),
        ("resourceconfig.json", '{"current_host": "c", "hosts": ["a", "b"]}', "current_host c"),
    ],
)
def test_what_sagemaker_gives_wrongly_ends_in_78_with_the_sentence_in_the_failure_file(
    name, text, sentence, training_job
):
    root = training_job()
    (root / "opt/ml/input/config" / name).write_text(text)
    done = command(root, "train")
    assert done.returncode == 78, done.stderr
    failure = (root / "opt/ml/output/failure").read_text()
    assert sentence in failure and failure.strip() in done.stderr and "Traceback" not in done.stderr


def test_one_of_several_hosts_of_sagemaker_waits_for_the_first_and_says_if_it_does_not_come(training_job):
    root = training_job({"nodes.wait_seconds": "1"}, hosts=("no-host.invalid", "algo-2"), this="algo-2")
    done = command(root, "train")
    assert done.returncode == 75, done.stderr
    failure = (root / "opt/ml/output/failure").read_text()
    assert "the first machine of the job did not answer at no-host.invalid:29500 within 1 s" in failure


def test_an_empty_channel_ends_in_66_and_the_failure_file_says_so(training_job):
    root = training_job()
    done = command(root, "plan")
    assert done.returncode == 66, done.stderr
    assert "input/data/quotes" in (root / "opt/ml/output/failure").read_text()


def test_sagemaker_plans_the_job_of_its_channels(training_job, toy_gpt2, llama_cpp):
    root = training_job({"tokens.max_length": "64"}, channels=("quotes", "model"))
    quotes = root / "opt/ml/input/data/quotes/voice.txt"
    quotes.write_text("\n".join(f"I counted {i} waves and every one was mine." for i in range(60)))
    (root / "opt/ml/input/data/model").rmdir()
    (root / "opt/ml/input/data/model").symlink_to(toy_gpt2)
    done = command(root, "plan", "--llama-cpp", str(llama_cpp.root))
    assert done.returncode == 0, done.stderr
    assert "voice.txt" in done.stdout and "optimizer steps" in done.stdout
    assert (root / "tmp/quotesmith/fetch").is_dir() and not (root / "opt/ml/output/failure").exists()


def test_vertex_says_where_things_go(tmp_path):
    found = origins(command(tmp_path, "config", "--json", env=VERTEX))
    assert found["output"] == ("gs://bucket/out/model", "Vertex AI's AIP_MODEL_DIR")
    assert found["resume.uri"] == ("gs://bucket/out/checkpoints", "Vertex AI's AIP_CHECKPOINT_DIR")
    assert found["tensorboard"] == ("gs://bucket/out/logs", "Vertex AI's AIP_TENSORBOARD_LOG_DIR")
    found = origins(command(tmp_path, "config", "--json", env={**VERTEX, "QUOTESMITH_OUTPUT": "gs://mine"}))
    assert found["output"] == ("gs://mine", "environment QUOTESMITH_OUTPUT")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("{", "not valid JSON"),
        ("{}", "KeyError"),
        ('{"cluster": 1, "task": 1}', "'int'"),
    ],
)
def test_what_vertex_gives_wrongly_ends_in_78_with_one_sentence(spec, sentence, tmp_path):
    done = command(tmp_path, "run", env={**VERTEX, "CLUSTER_SPEC": spec})
    assert done.returncode == 78, done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"output": "/gcs/bucket/models"}, "use gs://bucket/models"),
        ({"resume.uri": "/gcs/bucket/c"}, "use gs://bucket/c"),
        ({"tensorboard": "/gcs/bucket/logs"}, "use gs://bucket/logs"),
        ({"work_dir": "/gcs/bucket/work"}, "a folder elsewhere"),
    ],
)
def test_vertexs_view_of_buckets_is_not_written_to(flags, sentence, tmp_path):
    vertex = platforms.find(VERTEX, tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        resolve(flags, {}, None, vertex)
    assert resolve({"input": "/gcs/bucket/quotes"}, {}, None, vertex).config.input == ("/gcs/bucket/quotes",)


def test_the_program_itself_looks_where_it_is(training_job):
    root = training_job({"train.epochs": "none"})
    started = [sys.executable, "-c", COMMAND, root, "train"]
    env = {**environment({}), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(started, capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 78, done.stderr
    assert "train.epochs is 'none' (hyperparameter" in (root / "opt/ml/output/failure").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_a_job_that_is_ended_in_the_middle_of_an_import_says_so_where_the_platform_looks(training_job):
    """Where nothing unwinds yet, its watching thread ends the process."""
    root = training_job()
    started = [sys.executable, "-c", COMMAND, root, "train"]
    with subprocess.Popen(started, stderr=subprocess.PIPE, env={**environment({}), "PYTHONPATH": str(ROOT)}) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == 143
    assert (root / "opt/ml/output/failure").read_text() == f"{signals.sentence(signal.SIGTERM)}\n"


@pytest.mark.parametrize("env", [{}, POD, POD | {"PET_NNODES": "1"}])
def test_a_pod_that_fails_says_why_in_its_termination_message(env, pod):
    done = command(pod, "run", "--train.epochs", "0", env=env)
    assert done.returncode == 78, done.stderr
    assert (
        pod / "dev/termination-log"
    ).read_text() == "train.epochs is '0' (flag --train.epochs): input should be " + ("greater than 0\n")
    assert command(pod, "dance", env=env).returncode == 2
    assert (pod / "dev/termination-log").read_text() == "No such command 'dance'.\n"
    assert origins(command(pod, "config", "--json", env=env))["grace_seconds"] == (30.0, "Kubernetes' default")


def test_where_no_termination_log_is_mounted_none_is_made(tmp_path):
    done = command(tmp_path, "run", "--train.epochs", "0", env=POD)
    assert done.returncode == 78 and not (tmp_path / "dev").exists()


def test_a_log_that_cannot_be_written_does_not_change_the_exit_code(pod):
    (pod / "dev/termination-log").unlink()
    (pod / "dev/termination-log").mkdir()
    assert command(pod, "run", "--train.epochs", "0", env=POD).returncode == 78


def raising(error):
    def breaks():
        raise error

    return breaks


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ConfigError("the token hf_abcdefghijklmnopqrst\nis wrong"), 78, "the token [secret] is wrong"),
        (ConfigError("x" * 5000), 78, "x" * LONGEST_SENTENCE),
        (ZeroDivisionError("by zero"), 70, "a bug of quotesmith, whose traceback is in the log: ZeroDivisionError: by"),
        (OSError(28, "No space left on device", "model.safetensors"), 71, "the disk is full (model.safetensors)"),
        (entrypoint.Stopped(), 143, "stopped by SIGTERM; a run keeps its finished stages"),
    ],
)
def test_the_note_is_one_sentence_without_secrets(error, code, sentence, pod, capsys):
    assert entrypoint.exit_code_of(raising(error), platforms.find(POD, pod)) == code
    note = (pod / "dev/termination-log").read_text()
    assert note.startswith(sentence) and len(note) <= LONGEST_SENTENCE + 1 and note.count("\n") == 1


def test_success_leaves_no_note(pod):
    assert entrypoint.exit_code_of(lambda: None, platforms.find(POD, pod)) == 0
    assert (pod / "dev/termination-log").read_text() == ""


def test_every_platform_says_which_of_several_nodes_this_is(training_job, tmp_path):
    root = training_job(hosts=("algo-1", "algo-2", "algo-3"), this="algo-2")
    assert platforms.find({}, root).nodes() == Nodes(3, 1, "algo-1", 29500)

    def nodes(env):
        return platforms.find(env, tmp_path / "no-files").nodes()

    assert nodes({"CLUSTER_SPEC": json.dumps(CLUSTER)}) == Nodes(2, 1, "training-workerpool0-ab-0", 2222)
    injected = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "1", "JOB_COMPLETION_INDEX": "1"}
    injected |= {"PET_MASTER_ADDR": "voice-node-0-0.voice", "PET_MASTER_PORT": "29400"}
    assert nodes(POD | injected) == Nodes(2, 1, "voice-node-0-0.voice", 29400)
    ours = {"NNODES": "2", "MASTER_ADDR": "quotesmith-0.quotesmith", "JOB_COMPLETION_INDEX": "1"}
    assert nodes(POD | ours) == Nodes(2, 1, "quotesmith-0.quotesmith", 29500)
    assert nodes(POD) == nodes({}) == nodes(VERTEX) == Nodes()


def test_nodes_are_settings_that_flags_beat(tmp_path):
    env = {**VERTEX, "CLUSTER_SPEC": json.dumps(CLUSTER)}
    found = origins(command(tmp_path, "config", "--json", "--nodes.port", "2333", env=env))
    assert found["nodes.count"] == (2, "Vertex AI's nodes") and found["nodes.rank"] == (1, "Vertex AI's nodes")
    assert found["nodes.master"][0] == "training-workerpool0-ab-0"
    assert found["nodes.port"] == (2333, "flag --nodes.port")


@pytest.mark.parametrize(
    "env",
    [
        {"CLUSTER_SPEC": json.dumps({**CLUSTER, "cluster": {"workerpool0": ["a:1"], "workerpool2": ["b:1"]}})},
        {"CLUSTER_SPEC": json.dumps({**CLUSTER, "task": {"type": "workerpool1", "index": 7}})},
        {"PET_NNODES": "1:4"},
        POD | {"NNODES": "2"},
    ],
)
def test_nodes_that_cannot_be_understood_are_refused(env, tmp_path):
    with pytest.raises(ConfigError):
        platforms.find(env, tmp_path).nodes()
