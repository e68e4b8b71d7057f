"""The CPU image, built for real with buildah, and containers of it as a platform starts them, with podman.

Everything that takes minutes is kept: the base as a tar file in the cache, packages and llama.cpp as buildah's layers.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
PROGRAMS = ("podman", "buildah", "runc", "debootstrap", "catatonit")
USER = 10001
# runc and low limits: so that it works in virtual machines whose kernels lack what crun and podman's defaults ask for.
ENGINE = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
RESTRICTED = ("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--shm-size", "64m", "--cap-drop", "ALL")
RESTRICTED += ("--security-opt", "no-new-privileges", "--network", "none")
PIP_SETTINGS = ("cert", "client-cert", "extra-index-url", "find-links", "index-url", "proxy", "timeout", "trusted-host")


def missing() -> str:
    """Why no image is built and run here; empty if it is."""
    if not os.environ.get("QUOTESMITH_IMAGE"):
        return "takes long; QUOTESMITH_IMAGE=1 builds the image and runs it"
    if absent := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"no {', '.join(absent)}; the image is built and run with Debian's packages of these names"
    return "" if os.geteuid() == 0 else "building and running the image needs the rights of root"


def built(folder: Path, target: str = "") -> str:
    """The image's name, built if there is none of what it is made of. `folder` keeps this machine's pip settings, which
    the build needs and the image does not."""
    base = script("scripts/image/base.sh", {}).stdout.split()[-1]
    name = "-".join(filter(None, ("localhost/quotesmith:cpu", content_key(base), target)))
    if not subprocess.run(["podman", "image", "exists", name]).returncode:
        return name
    settings = pip_settings()
    config = folder / "pip.conf"
    config.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    env = {"BUILDER": "buildah", "VARIANT": "cpu", "BASE": base, "PIP_CONFIG": str(config)}
    if "index-url" in settings:
        env["INDEX_URL"] = settings["index-url"]
    if {"find-links", "extra-index-url"} & set(settings):
        env["EXTRA_INDEX_URL"] = ""  # torch's CPU wheel is there
    options = ["--isolation", "chroot", "--network", "host"]
    for path in local_paths(settings):
        options += ["--volume", f"{path}:{path}:ro"]
    script("scripts/build_image.sh", env, *options, "--tag", name, *(["--target", target] if target else []))
    return name


def content_key(base: str) -> str:
    """Changes with everything that the image is made of."""
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    found = hashlib.sha256(base.encode())
    for place in ("Dockerfile", "scripts/build_image.sh", *sent):
        path = ROOT / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                found.update(f"{file.relative_to(ROOT)} {file.stat().st_size} ".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def script(path: str, env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([ROOT / path, *args], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{path} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def pip_settings() -> dict[str, str]:
    """How pip reaches an index from this machine, variables before files as pip itself takes them."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found: dict[str, str] = {}
    for line in sorted(listed.stdout.splitlines(), reverse=True):  # `global.` before `:env:.`
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in PIP_SETTINGS:
            found[key] = " ".join(ast.literal_eval(value).split())
    return found


def local_paths(settings: dict[str, str]) -> Iterator[str]:
    for value in settings.values():
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute():
                yield str(path.parent if path.name == "simple" else path)  # an index's files may lie beside its pages


@dataclass
class Engine:
    """podman with settings of its own; what it started is removed by `close`."""

    folder: Path
    started: list[str] = field(default_factory=list)
    pods: list[str] = field(default_factory=list)  # manifests

    def __post_init__(self) -> None:
        self.settings = self.folder / "containers.conf"
        self.settings.write_text(ENGINE)

    def __call__(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(["podman", *args], env=self.env(), capture_output=True, text=True)
        assert not check or done.returncode == 0, f"podman {args[0]}: {done.stderr}"
        return done

    def env(self) -> dict[str, str]:
        return os.environ | {"CONTAINERS_CONF": str(self.settings)}

    def start(self, image: str, *args: str, options: Sequence[str] = RESTRICTED) -> Container:
        name = f"quotesmith-{uuid.uuid4().hex[:8]}"
        self.started.append(name)
        process = subprocess.Popen(
            ["podman", "run", "--name", name, *options, image, *args],
            env=self.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return Container(self, name, process)

    def run(self, image: str, *args: str, options: Sequence[str] = RESTRICTED) -> Container:
        return self.start(image, *args, options=options).ended()

    def close(self) -> None:
        for manifest in self.pods:
            self("kube", "down", manifest, check=False)
        for name in self.started:
            self("rm", "--force", "--time", "0", "--ignore", name, check=False)


@dataclass
class Container:
    engine: Engine
    name: str
    process: subprocess.Popen[str]
    out: str = ""
    said: str = ""

    @property
    def code(self) -> int | None:
        return self.process.returncode

    def wait_for(self, line: str) -> None:
        assert self.process.stderr
        for text in self.process.stderr:
            self.said += text
            if line in text:
                return
        raise AssertionError(f"it ended without saying {line!r}:\n{self.said}")

    def stop(self) -> Container:
        """SIGTERM, as `docker stop` sends it."""
        self.engine("kill", "--signal", "TERM", self.name)
        return self.ended()

    def ended(self) -> Container:
        out, said = self.process.communicate(timeout=1200)
        self.out += out
        self.said += said
        return self

    def changed(self) -> list[str]:
        """Paths of the image's own file system that are other than they were."""
        return [line.split(" ", 1)[1] for line in self.engine("diff", self.name).stdout.splitlines()]


def mounted(*places: tuple[Path, str], read_only: bool = False) -> list[str]:
    return [each for outside, inside in places for each in ("--volume", f"{outside}:{inside}{':ro' * read_only}")]


def variables(env: dict[str, str]) -> list[str]:
    return [each for pair in env.items() for each in ("--env", "=".join(pair))]


def folder_of(user: int, path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    os.chown(path, user, user)
    return path
