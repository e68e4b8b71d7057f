"""A complete job for each platform, held against the platform's own schema and against our own settings."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import entrypoint
from pipeline import errors, platforms
from pipeline.errors import ConfigError
from pipeline.options import Door
from pipeline.render import PLATFORMS, Request, job_of, render, sagemaker
from pipeline.settings import all_settings, resolve

ROOT = Path(entrypoint.__file__).parent
ROLE = "arn:aws:iam::123456789012:role/quotesmith"
GIVEN = {
    "input": ["s3://bucket/quotes/", "s3://bucket/more.txt"],
    "output": "s3://bucket/models",
    "name": "My.Voice",
    "train.epochs": "3",
    "quantize.types": '["Q2_K", "Q4_0"]',
    "sparsity.keep_zeros": "true",
    "evaluate.prompts": '["Well, \\"I\\"", "$HOME `ls` \'"]',
    "work_dir": "/home/me/work",
}


def job(flags=None, **request):
    return job_of(resolve(GIVEN if flags is None else flags, {}), Request(**request))


def read_back(env):
    """The settings that a container with this environment would have."""
    return resolve({}, env).config


@pytest.fixture
def expected():
    """What every platform must end up with: all that was given, but no path of this machine."""
    return resolve({key: value for key, value in GIVEN.items() if key != "work_dir"}, {}).config


def same_but_grace(found, expected):
    return found.model_dump(exclude={"grace_seconds"}) == expected.model_dump(exclude={"grace_seconds"})


# docker


def options_of(line, environment=None):
    """The words of the line as a shell would make them."""
    script = f'docker() {{ printf "%s\\0" "$@"; }}\n{line}'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env=environment or {})
    return done.stdout.split("\0")[:-1]


def env_of(words):
    pairs = [words[i + 1] for i, word in enumerate(words) if word == "--env" and "=" in words[i + 1]]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs) if name.startswith("QUOTESMITH_")}


def test_docker_gets_the_same_settings_through_a_real_shell(expected):
    words = options_of(render("docker", job()))
    assert words[0] == "run" and words[-2:] == ["quotesmith:0.1.0", "run"]
    found = read_back(env_of(words))
    assert same_but_grace(found, expected)
    assert words[words.index("--stop-timeout") + 1] == "120" and found.grace_seconds == 120


def test_docker_runs_without_rights_and_with_a_read_only_root():
    words = options_of(render("docker", job()))
    assert {"--read-only", "--cap-drop", "--security-opt", "--tmpfs", "--user"} <= set(words)
    assert re.fullmatch(r"\d+:\d+", words[words.index("--user") + 1])
    assert "--gpus" not in options_of(render("docker", job(gpus=0)))


def test_docker_mounts_this_machines_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my quotes").mkdir()
    words = options_of(render("docker", job({"input": ["my quotes", "gs://b/x.txt"], "output": "models"})))
    found = read_back(env_of(words))
    mounts = dict(
        reversed(words[i + 1].removesuffix(":ro").split(":")) for i, word in enumerate(words) if word == "--volume"
    )
    assert mounts[found.input[0]] == str(tmp_path / "my quotes") and found.input[1] == "gs://b/x.txt"
    assert mounts[found.output] == str(tmp_path / "models") and (tmp_path / "models").is_dir()
    assert f"{tmp_path / 'my quotes'}:{found.input[0]}:ro" in words
    assert mounts["/work"] == "quotesmith-gpt2-ye-trump-work"


def test_docker_mounts_the_folder_of_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = options_of(render("docker", job({"input": ["quotes/*.txt"]})))
    assert f"{tmp_path / 'quotes'}:/data/0:ro" in words and read_back(env_of(words)).input == ("/data/0/*.txt",)


def test_docker_keeps_what_comes_out_also_when_no_output_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = options_of(render("docker", job({})))
    assert f"{tmp_path / 'out'}:/data/output" in words and read_back(env_of(words)).output == "/data/output"


def test_docker_names_credentials_and_shows_none(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0123456789abcdef")
    line = render("docker", job())
    assert "AWS_SECRET_ACCESS_KEY" in shlex.split(line) and "0123456789abcdef" not in line
    line = render("docker", job({"input": ["gs://b/q/"], "output": "gs://b/m"}))
    words = options_of(line, {"GOOGLE_APPLICATION_CREDENTIALS": "/home/me/my key.json"})
    assert "/home/me/my key.json:/run/secrets/google.json:ro" in words
    assert "google.json" not in " ".join(options_of(line))


# Vertex AI


def test_the_checks_of_fields_find_a_wrong_one():
    with pytest.raises(Exception, match='no field named "imageUrl"'):
        custom_job_spec(render("vertex", job(GOOGLE)).replace("imageUri", "imageUrl"))
    with pytest.raises(AssertionError, match="VolumeSize"):
        training_job(render("sagemaker", job(identity=ROLE)).replace("VolumeSizeInGB", "VolumeSize"))


def custom_job_spec(text):
    """Parsed by the service's own message; an unknown field is an error."""
    types = pytest.importorskip("google.cloud.aiplatform_v1.types")
    from google.protobuf import json_format

    return json_format.ParseDict(yaml.safe_load(text), types.CustomJobSpec.pb()())


GOOGLE = {**GIVEN, "input": ["gs://bucket/quotes/"], "output": "gs://bucket/models"}


def test_vertex_takes_the_file_and_the_container_gets_the_same_settings():
    spec = custom_job_spec(render("vertex", job(GOOGLE, identity="me@project.iam.gserviceaccount.com", spot=True)))
    (pool,) = spec.worker_pool_specs
    assert list(pool.container_spec.args) == ["run"] and pool.replica_count == 1
    expected = resolve({key: value for key, value in GOOGLE.items() if key != "work_dir"}, {}).config
    assert read_back({each.name: each.value for each in pool.container_spec.env}) == expected
    assert (pool.machine_spec.machine_type, pool.machine_spec.accelerator_count) == ("g2-standard-8", 1)
    assert spec.scheduling.timeout.seconds == 6 * 3600 and spec.service_account.startswith("me@")
    assert type(spec.scheduling).Strategy.Name(spec.scheduling.strategy) == "SPOT"


@pytest.mark.parametrize(
    ("request_", "kind", "accelerator"),
    [
        ({"gpus": 0}, "n2-standard-8", "ACCELERATOR_TYPE_UNSPECIFIED"),
        ({"gpus": 4}, "g2-standard-48", "NVIDIA_L4"),
        ({"machine": "a2-highgpu-1g"}, "a2-highgpu-1g", "NVIDIA_TESLA_A100"),
        ({"machine": "a2-ultragpu-1g"}, "a2-ultragpu-1g", "NVIDIA_A100_80GB"),
        ({"machine": "a3-highgpu-8g", "gpus": 8}, "a3-highgpu-8g", "NVIDIA_H100_80GB"),
        ({"machine": "a3-megagpu-8g", "gpus": 8}, "a3-megagpu-8g", "NVIDIA_H100_MEGA_80GB"),
        ({"machine": "n1-standard-8"}, "n1-standard-8", "NVIDIA_TESLA_T4"),
    ],
)
def test_vertex_machines_have_the_gpu_that_fits(request_, kind, accelerator):
    spec = custom_job_spec(render("vertex", job(GOOGLE, **request_)))
    machine = spec.worker_pool_specs[0].machine_spec
    types = pytest.importorskip("google.cloud.aiplatform_v1.types")
    assert (machine.machine_type, types.AcceleratorType(machine.accelerator_type).name) == (kind, accelerator)


def test_vertex_with_several_nodes_has_one_primary():
    pools = custom_job_spec(render("vertex", job(GOOGLE, nodes=3))).worker_pool_specs
    assert [pool.replica_count for pool in pools] == [1, 2]
    assert pools[0].container_spec == pools[1].container_spec


# SageMaker


def training_job(text):
    """Checked as the SDK checks it before it sends it."""
    import boto3
    from botocore.validate import ParamValidator

    asked = json.loads(text)
    client = boto3.client("sagemaker", "us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    shape = client.meta.service_model.operation_model("CreateTrainingJob").input_shape
    report = ParamValidator().validate(asked, shape)
    assert not report.has_errors(), report.generate_report()
    return asked, shape


def test_sagemaker_takes_the_request_and_its_container_gets_the_same_settings(tmp_path, expected):
    asked, shape = training_job(render("sagemaker", job(identity=ROLE)))
    check_patterns(asked, shape)
    config = tmp_path / "opt/ml/input/config"
    config.mkdir(parents=True)
    (config / "hyperparameters.json").write_text(json.dumps(asked["HyperParameters"]))
    channels = {each["ChannelName"]: {"TrainingInputMode": each["InputMode"]} for each in asked["InputDataConfig"]}
    (config / "inputdataconfig.json").write_text(json.dumps(channels))
    found = resolve({}, {}, None, platforms.find({}, tmp_path)).config
    kept = {"grace_seconds", "input", "work_dir", "tensorboard"}
    assert found.model_dump(exclude=kept) == expected.model_dump(exclude=kept)
    assert asked["TensorBoardOutputConfig"]["S3OutputPath"] == f"{GIVEN['output']}/tensorboard"
    assert found.input == tuple(f"{tmp_path}/opt/ml/input/data/quotes-0{number}" for number in (0, 1))
    sources = [each["DataSource"]["S3DataSource"]["S3Uri"] for each in asked["InputDataConfig"]]
    assert sources == GIVEN["input"]


def test_a_server_takes_the_request_of_sagemaker(s3_server, monkeypatch):
    import boto3

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    client = boto3.client("sagemaker", endpoint_url=s3_server, **keys)
    asked, _ = training_job(render("sagemaker", job(identity=ROLE)))
    client.create_training_job(**asked)
    described = client.describe_training_job(TrainingJobName=asked["TrainingJobName"])
    assert described["HyperParameters"] == asked["HyperParameters"]


def check_patterns(value, shape):
    """What botocore leaves to the service: patterns of names."""
    if shape.type_name == "structure":
        for name, each in value.items():
            check_patterns(each, shape.members[name])
    elif shape.type_name == "list":
        for each in value:
            check_patterns(each, shape.member)
    elif shape.type_name == "string" and (pattern := shape.metadata.get("pattern")):
        assert re.fullmatch(pattern, value), (shape.name, value)
        assert not shape.metadata.get("enum") or value in shape.metadata["enum"], (shape.name, value)


def test_a_spot_job_of_sagemaker_may_wait():
    asked, _ = training_job(render("sagemaker", job(identity=ROLE, spot=True, nodes=2, gpus=8)))
    stops = asked["StoppingCondition"]
    assert asked["EnableManagedSpotTraining"] and stops["MaxWaitTimeInSeconds"] >= stops["MaxRuntimeInSeconds"]
    assert asked["ResourceConfig"]["InstanceCount"] == 2
    assert asked["ResourceConfig"]["InstanceType"] == "ml.g5.48xlarge"


@pytest.mark.parametrize("uris", [["s3://b/*.txt"], ["s3://b/a", "gs://b/a"], [f"s3://b/{i}" for i in range(21)]])
def test_inputs_that_are_no_channels_stay_a_setting(uris):
    asked, _ = training_job(render("sagemaker", job({**GIVEN, "input": uris}, identity=ROLE)))
    assert "InputDataConfig" not in asked and json.loads(asked["HyperParameters"]["input"]) == uris


KL = "%s: step %d of %d, validation KL %.4f nats a token"
LOGGED = [  # formats of our log calls, each with what could stand there
    *(("evaluate: %s: perplexity %.1f, %s", (stage, 153.24, "CHANGE")) for stage in sagemaker.STAGES),
    *((KL, (stage, 10, 60, 0.0123)) for stage in ("recover", "adapt", "finish")),
    ("sparsify: share of zeros %.4f in %d matrices by %s", (0.5, 48, "sparsegpt")),
    ("quantize: %s %.1f MB, %.2f bits a weight", ("my-voice-Q2_K.gguf", 70.7, 4.43)),
]


def test_the_metrics_of_sagemaker_are_found_in_our_log_lines():
    from pipeline import evaluate

    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "pipeline").glob("*.py"))
    assert all(f'"{form}"' in source for form, _ in LOGGED)
    change = evaluate.change(evaluate.Interval(value=1.001, low=0.993, high=1.01))
    log = "\n".join(json.dumps({"message": form % given}) for form, given in LOGGED).replace("CHANGE", change)
    found = {name: re.findall(regex, log) for name, regex in sagemaker.METRICS.items()}
    assert all(len(values) == 1 for values in found.values()), found
    assert (found["perplexity:tuned"], found["ratio:F16"]) == (["153.2"], ["1.001"])
    assert (found["finish:kl"], found["bits-a-weight"]) == (["0.0123"], ["4.43"])


# all


def test_the_command_prints_a_job_for_every_platform(tmp_path):
    (tmp_path / "job.yaml").write_text("input: [s3://bucket/quotes/]\noutput: s3://bucket/models\ntrain: {epochs: 3}\n")
    for platform in PLATFORMS:
        more = ["--identity", ROLE] if platform == "sagemaker" else []
        args = ["render", platform, "--config", str(tmp_path / "job.yaml"), *more]
        done = CliRunner().invoke(entrypoint.cli, args, obj=Door(platforms.find({}, tmp_path)))
        assert done.exit_code == 0, (platform, done.output, done.exception)
        assert "s3://bucket/models" in done.stdout and "3.0" in done.stdout


@pytest.mark.parametrize(
    ("platform", "flags", "request_", "sentence"),
    [
        ("k8s", {}, {}, "output is not set"),
        ("vertex", {**GOOGLE, "input": ["quotes/"]}, {}, "input is quotes/, a path of this machine"),
        ("trainjob", {**GOOGLE, "model.base": "./gpt2"}, {}, "model.base is ./gpt2"),
        ("sagemaker", GOOGLE, {"identity": ROLE}, r"must be a bucket \(s3://"),
        ("sagemaker", GIVEN, {}, "--identity"),
        ("sagemaker", GIVEN, {"identity": ROLE, "gpus": 3}, "--machine"),
        ("sagemaker", GIVEN, {"identity": ROLE, "cpus": 8}, "--cpus means nothing"),
        ("vertex", GOOGLE, {"gpus": 3}, "--machine"),
        ("vertex", GOOGLE, {"machine": "e2-standard-4"}, "e2-standard-4 has no GPU"),
        ("docker", {"input": ["quo*/a.txt"]}, {}, "whose folder is a pattern"),
        ("docker", GIVEN, {"nodes": 2}, "--nodes means nothing to docker"),
        ("k8s", GIVEN, {"spot": True}, "--spot means nothing to k8s"),
    ],
)
def test_what_a_platform_cannot_do_is_refused(platform, flags, request_, sentence):
    with pytest.raises(ConfigError, match=sentence):
        render(platform, job(flags, **request_))


def test_a_scheduler_is_told_of_every_code_that_no_retry_helps():
    codes = errors.no_retry_helps()
    assert codes == [2, 65, 66, 70, 73, 77, 78]
    kinds = errors.QuotesmithError.__subclasses__()
    assert {kind.exit_code for kind in kinds if kind.exit_code not in codes} == {69, 71, 74, 75}


def test_every_name_in_an_environment_is_a_setting():
    names = {setting.env for setting in all_settings()}
    assert set(job().env()) <= names and "QUOTESMITH_WORK_DIR" not in job().env()
