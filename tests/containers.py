"""The CPU image, built for real with buildah, and containers of it as a platform starts them, with podman.

Everything that takes minutes is kept: the base as a tar file in the cache, packages and llama.cpp as buildah's layers.
All of it is in a store of its own, so that what older sources left there can be removed without looking at anything of
this machine's.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
DEMANDED = os.environ.get("IMAGE_TESTS", "")  # 1: what is missing fails the tests; 0: not even tried
ROOM = 8e9  # bytes: a build from nothing keeps 3.6 GB, and holds its largest layer twice more while it is committed
IMAGE = "localhost/quotesmith:cpu-"
HELD: list[IO[str]] = []
PROGRAMS = ("podman", "buildah", "runc", "debootstrap", "catatonit")
USER = 10001
STORE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quotesmith" / "containers"
# Nothing is shared with podman's other stores. overlay, by name: what podman takes in its stead (vfs) copies the whole
# image for each layer and for each container.
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{store}/storage"
runroot = "{run}/storage"
"""
# runc and low limits: so that it works in virtual machines whose kernels lack what crun and podman's defaults ask for.
ENGINE = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{run}/libpod"
"""
RESTRICTED = ("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--shm-size", "64m", "--cap-drop", "ALL")
RESTRICTED += ("--security-opt", "no-new-privileges", "--network", "none")
PIP_SETTINGS = ("cert", "client-cert", "extra-index-url", "find-links", "index-url", "proxy", "timeout", "trusted-host")


@cache
def missing() -> str:
    """Why no image is built and run here; empty if it is."""
    if DEMANDED == "0":
        return "IMAGE_TESTS=0"
    if absent := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"no {', '.join(absent)}; the image is built and run with Debian's packages of these names"
    if os.geteuid() != 0:
        return "building and running the image needs the rights of root"
    info = subprocess.run(["podman", "info"], env=os.environ | settings(), capture_output=True, text=True)
    return f"podman does not work here: {info.stderr.strip()[-300:]}" if info.returncode else ""


def refuse(why: str) -> NoReturn:
    (pytest.fail if DEMANDED == "1" else pytest.skip)(why)


def settings() -> dict[str, str]:
    """What podman and buildah must find in their environment to use our store and runtime."""
    STORE.mkdir(parents=True, exist_ok=True)
    found = {}
    run = f"/run/quotesmith-containers/{hashlib.sha256(bytes(STORE)).hexdigest()[:8]}"
    for name, text in (("CONTAINERS_STORAGE_CONF", STORAGE), ("CONTAINERS_CONF", ENGINE)):
        found[name] = str(STORE / f"{name.lower()}.toml")
        written = STORE / f"{uuid.uuid4().hex}.toml"
        written.write_text(text.format(store=STORE, run=run))
        written.replace(found[name])  # another process may be reading it
    return found


def built(folder: Path, target: str = "", **given: str) -> str:
    """The image's name, built if there is none of what it is made of. `folder` keeps this machine's pip settings, which
    the build needs and the image does not; `given` are scripts/build_image.sh's."""
    if why := missing():
        refuse(why)
    with alone():
        base = script("scripts/image/base.sh", {}).stdout.split()[-1]
        key = content_key(base)
        hold(key)
        name = "-".join(filter(None, (f"{IMAGE}{key}", target)))
        if subprocess.run(["podman", "image", "exists", name], env=os.environ | settings()).returncode:
            build(name, folder / "pip.conf", {"BASE": base, **given}, ["--target", target] if target else [])
    return name


def build(name: str, config: Path, given: dict[str, str], options: list[str]) -> None:
    if (free := shutil.disk_usage(STORE).free) < ROOM:
        refuse(f"building the image needs {ROOM / 1e9:.0f} GB in {STORE}, where {free / 1e9:.1f} GB are free")
    pip = pip_settings()
    config.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in pip.items()))
    env = {"BUILDER": "buildah", "VARIANT": "cpu", "PIP_CONFIG": str(config), **given}
    if "index-url" in pip:
        env["INDEX_URL"] = pip["index-url"]
    if {"find-links", "extra-index-url"} & set(pip):
        env["EXTRA_INDEX_URL"] = ""  # torch's CPU wheel is there
    options += ["--isolation", "chroot", "--network", "host", "--tag", name]
    for path in local_paths(pip):
        options += ["--volume", f"{path}:{path}:ro"]
    done = script("scripts/build_image.sh", env, *options)
    remove_older(env["BASE"], set(re.findall(r"^--> (?:Using cache )?([0-9a-f]{11})", done.stdout + done.stderr, re.M)))


@contextmanager
def alone() -> Iterator[None]:
    """One build at a time in the store; another process waits for its end and finds the image."""
    settings()
    with (STORE / "building").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hold(key: str) -> None:
    """Keeps the images of `key` from being removed until this process ends."""
    file = (STORE / f"used-{key}").open("w")
    fcntl.flock(file, fcntl.LOCK_SH)
    HELD.append(file)


def is_held(key: str) -> bool:
    path = STORE / f"used-{key}"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        path.unlink()
    return False


def remove_older(base: str, steps: set[str]) -> None:
    """All images but those that a process holds, their base and the `steps` of the build that has just ended, which the
    next one finds again. With --no-prune: an image takes no step with it that it was made from."""
    podman("container", "prune", "--force", "--filter", "until=1h")  # of tests that were killed
    subprocess.run(["buildah", "rm", "--all"], env=os.environ | settings(), capture_output=True)  # and of builds
    for name in [name for each in images() for name in each.get("Names") or ()]:
        key = re.match(f"{re.escape(IMAGE)}([0-9a-f]{{16}})", name)
        if name != base and not (key and is_held(key[1])):
            podman("rmi", "--no-prune", name)
    gone = True
    while gone:  # an image is refused while another is made of it
        spare = [each["Id"] for each in images() if not each.get("Names") and each["Id"][:11] not in steps]
        gone = 0 in [podman("rmi", "--no-prune", identity).returncode for identity in spare]


def images() -> list[dict[str, Any]]:
    return json.loads(podman("images", "--all", "--format", "json").stdout)


def podman(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["podman", *args], env=os.environ | settings(), capture_output=True, text=True)


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
    done = subprocess.run([ROOT / path, *args], env=os.environ | settings() | env, capture_output=True, text=True)
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
    """podman in our store; what it started is removed by `close`."""

    started: list[str] = field(default_factory=list)
    pods: list[str] = field(default_factory=list)  # manifests

    def __call__(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = podman(*args)
        assert not check or done.returncode == 0, f"podman {args[0]}: {done.stderr}"
        return done

    def env(self) -> dict[str, str]:
        return os.environ | settings()

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
        out, said = self.process.communicate(timeout=3600)
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
