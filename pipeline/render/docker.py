"""A `docker run` line for a POSIX shell: read-only root, no capabilities, the caller's own user."""

from __future__ import annotations

import shlex
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.render import Job, as_text, refuse
from pipeline.settings import all_settings

WORK = "/work"
WRITTEN = ("output", "resume.uri", "tensorboard")  # settings
# The names go into the line, the values stay in the caller's environment; docker leaves out what is not set there.
SECRETS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL"),
    "": ("HF_TOKEN", "HF_ENDPOINT"),
}
GOOGLE = "GOOGLE_APPLICATION_CREDENTIALS"
GOOGLE_KEY = "/run/secrets/google.json"


def render(job: Job) -> str:
    refuse(job, "docker", "nodes", "hours", "starts", "spot", "identity", "machine", "disk_gib")
    mounts, places, written = mounted(job)
    request = job.request
    options = ["--rm", "--name", job.name, "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    options += ["--gpus", str(request.gpus)] if request.gpus else []
    options += ["--cpus", str(request.cpus), "--memory", f"{request.memory_gib}g", "--shm-size", "1g"]
    options += ["--stop-timeout", str(job.grace_seconds), "--tmpfs", "/tmp"]
    options += ["--volume", f"{job.name}-work:{WORK}", *mounts]
    names = {setting.key: setting.env for setting in all_settings()}
    env = {names[key]: text for key, text in (job.texts() | places).items()}
    for name, text in {**env, "QUOTESMITH_GRACE_SECONDS": str(job.grace_seconds)}.items():
        options += ["--env", f"{name}={text}"]
    schemes = job.schemes()
    for scheme in sorted(schemes & set(SECRETS) | {""}):
        for name in SECRETS[scheme]:
            options += ["--env", name]
    shell = ['--user "$(id -u):$(id -g)"']
    if "gs" in schemes:
        shell.append(f'${{{GOOGLE}:+--volume "${GOOGLE}:{GOOGLE_KEY}:ro" --env {GOOGLE}={GOOGLE_KEY}}}')
    words = [shlex.join(["docker", "run", *options]), *shell, shlex.quote(request.image), "run"]
    # docker would make a folder that is missing for root, and the job is not root
    before = [shlex.join(["mkdir", "-p", *written]), "&&"] if written else []
    return " ".join([*before, *words]) + "\n"


def is_glob(text: str) -> bool:
    return bool(set("*?[") & set(text))


def mounted(job: Job) -> tuple[list[str], dict[str, str], list[str]]:
    """Options that mount this machine's paths, the settings with their paths in the container, the written folders."""
    options: list[str] = []
    written: list[str] = []
    inside: dict[tuple[str, str], str] = {}
    for number, (key, path) in enumerate(job.local_paths()):
        outside = Path(path.removeprefix("file://")).expanduser().absolute()
        if key in WRITTEN:
            inside[key, path] = f"/data/{number}"
            options += ["--volume", f"{outside}:/data/{number}"]
            written.append(str(outside))
        else:
            inside[key, path] = f"/data/{number}/{outside.name}"
            source, target = outside, inside[key, path]
            if is_glob(outside.name):
                source, target = outside.parent, f"/data/{number}"
            if is_glob(str(source)):
                raise ConfigError(f"{key} is {path}, whose folder is a pattern; name the folders for docker to mount")
            options += ["--volume", f"{source}:{target}:ro"]
    if "output" not in job.settings:
        outside = Path(job.config.output).absolute()
        options += ["--volume", f"{outside}:/data/output"]
        inside["output", ""] = "/data/output"
        written.append(str(outside))
    places = {key: place for (key, _), place in inside.items() if key != "input"}
    if any(key == "input" for key, _ in inside):
        places["input"] = as_text([inside.get(("input", each), each) for each in job.settings["input"]])
    return options, places, written
