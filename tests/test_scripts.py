"""The shell scripts: clean by shellcheck, and what the submit scripts hand to the platforms' clients."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from pipeline.render import Request, job_of, render
from pipeline.settings import resolve

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"])
ROLE = "arn:aws:iam::123456789012:role/quotesmith"
CLIENT = """#!/bin/sh
printf '%s\\n' "$@" >"$0.arguments"
for each in "$@"; do
  case $each in
    file://*) cp "${each#file://}" "$0.file" ;;
    /*) cp "$each" "$0.file" ;;
  esac
done
exit "${CLIENT_CODE:-0}"
"""


def test_shell_scripts_are_clean():
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("no shellcheck; the extra `dev` brings one")
    done = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def submit(tmp_path):
    """Runs a submit script where only these clients exist; the result, the client's arguments and its file."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "job.yaml").write_text("input: [s3://bucket/quotes/]\noutput: s3://bucket/models\nname: my-voice\n")
    scripts = tmp_path / "scripts"  # without a .venv beside
    shutil.copytree(ROOT / "scripts", scripts, ignore=shutil.ignore_patterns("__pycache__", "llama_cpp"))
    write(programs / "quotesmith", f'#!/bin/sh\nexec {sys.executable} {ROOT}/entrypoint.py "$@"\n')
    for name in ("bash", "cat", "cp", "date", "dirname", "env", "mktemp", "rm", "sed", "sh"):
        (programs / name).symlink_to(shutil.which(name))

    def run(platform, client, *args, code="0"):
        if client:
            write(programs / client, CLIENT)
        done = subprocess.run(
            [scripts / f"submit_{platform}.sh", "--config", "job.yaml", *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PATH": str(programs), "CLIENT_CODE": code, "TMPDIR": str(tmp_path), "HOME": os.environ["HOME"]},
        )
        arguments, file = programs / f"{client}.arguments", programs / f"{client}.file"
        assert not list(tmp_path.glob("tmp.*"))
        given = arguments.read_text().splitlines() if arguments.exists() else None
        return done, given, file.read_text() if file.exists() else None

    return run


def write(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(("platform", "kind"), [("k8s", "Job"), ("trainjob", "TrainJob")])
def test_kubectl_applies_the_manifests(platform, kind, submit):
    done, arguments, file = submit(platform, "kubectl", "--image", "registry/q:1", "--", "--namespace", "my voices")
    assert done.returncode == 0, done.stderr
    assert arguments[:2] == ["apply", "--filename"] and arguments[3:] == ["--namespace", "my voices"]
    last = list(yaml.safe_load_all(file))[-1]
    assert (last["kind"], last["metadata"]["name"]) == (kind, "quotesmith-my-voice")
    assert "registry/q:1" in file


def test_gcloud_creates_the_custom_job(submit):
    done, arguments, file = submit("vertex", "gcloud", "--", "--region", "us-central1")
    assert done.returncode == 0, done.stderr
    assert arguments[:4] == ["ai", "custom-jobs", "create", "--display-name"]
    assert arguments[-2:] == ["--region", "us-central1"]
    assert yaml.safe_load(file)["workerPoolSpecs"][0]["replicaCount"] == 1


class VertexAI(BaseHTTPRequestHandler):
    """Takes a custom job, as the real service would."""

    asked: ClassVar[list] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path.partition("?")[0], json.loads(body)))
        answer = json.dumps({"name": "projects/1/locations/us-central1/customJobs/2"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def test_the_real_gcloud_sends_the_job(tmp_path):
    gcloud = shutil.which("gcloud") or pytest.skip("no gcloud")
    text = render("vertex", job_of(resolve({"output": "gs://bucket/models"}, {}), Request()))
    (tmp_path / "job.yaml").write_text(text)
    server = HTTPServer(("127.0.0.1", 0), VertexAI)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_PROJECT": "my-project",
        "CLOUDSDK_AUTH_ACCESS_TOKEN": "no-token",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"http://127.0.0.1:{server.server_port}/",
    }
    command = [gcloud, "ai", "custom-jobs", "create", "--region", "us-central1", "--display-name", "x", "--quiet"]
    command += ["--config", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    server.shutdown()
    assert done.returncode == 0, done.stderr
    ((path, asked),) = VertexAI.asked
    assert path == "/v1/projects/my-project/locations/us-central1/customJobs"
    container = asked["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]
    assert container["env"] == [{"name": "QUOTESMITH_OUTPUT", "value": "gs://bucket/models"}]


def test_aws_creates_the_training_job_under_a_name_of_its_own(submit):
    done, arguments, file = submit("sagemaker", "aws", "--identity", ROLE)
    assert done.returncode == 0, done.stderr
    name = arguments[arguments.index("--training-job-name") + 1]
    asked = json.loads(file)
    assert name.startswith(asked["TrainingJobName"] + "-") and len(name) <= 63
    assert asked["RoleArn"] == ROLE


def test_what_cannot_be_rendered_is_not_submitted(submit):
    done, arguments, _ = submit("sagemaker", "aws")
    assert done.returncode == 78 and arguments is None and "--identity" in done.stderr


def test_the_clients_own_failure_is_the_scripts(submit):
    done, *_ = submit("k8s", "kubectl", code="3")
    assert done.returncode == 3


def test_a_client_that_is_not_there_is_named(submit):
    done, *_ = submit("vertex", None)
    assert done.returncode == 69 and "gcloud is not installed" in done.stderr
