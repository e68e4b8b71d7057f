"""Whether a job can run on this machine, and if not, why: `entrypoint.py --self-test`.

`quick` imports no torch, which takes seconds, so that what is wrong is said within two; `thorough` computes with it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform as python
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline import __version__, llama_cpp
from pipeline.config import JobConfig
from pipeline.cuda_driver import Build, Driver, torch_build
from pipeline.disk import LEAST_FREE_BYTES
from pipeline.errors import ConfigError, NotAllowed, QuotesmithError
from pipeline.finding import Finding
from pipeline.gpu_check import dotted, gpu_findings, unused
from pipeline.memory import RUNTIME_BYTES, cores, memory_available, memory_limit
from pipeline.platforms import Platform
from pipeline.versions import PACKAGES, revision
from pipeline.work_folder import check_work_dir

# What room.py asks for GPT-2 with the default settings; another base model needs more or less.
GPT2_DISK_BYTES = 2_900_000_000
GPT2_MEMORY_BYTES = 2_900_000_000
SHM_BYTES = 64 << 20  # docker's default, with which jobs on one GPU run
GB = 1e9


class Part(NamedTuple):
    """One line of the report, and what is to be said of it."""

    name: str
    found: str
    findings: tuple[Finding, ...] = ()

    def lines(self) -> list[str]:
        return [f"{self.name:10} {self.found}", *(f"  {line}" for each in self.findings for line in each.lines())]


def quick(cfg: JobConfig, platform: Platform, driver: Driver, env: Mapping[str, str], root: Path) -> Iterator[Part]:
    """Everything that can be known without torch. `root` is the file system's."""
    yield Part("quotesmith", f"{__version__}, revision {revision()}")
    yield packages()
    yield checked("platform", lambda: platform_of(platform, cfg))
    yield gpu_part(driver, torch_build(), cfg.device, env)
    yield checked("llama.cpp", lambda: tools(cfg.llama_cpp))
    yield checked("work_dir", lambda: work_folder(cfg.work_dir))
    yield checked("/tmp", temporary_files)
    yield shared_memory(root)
    yield machine(root)


def thorough(cfg: JobConfig, driver: Driver) -> Iterator[Part]:
    """Imports torch and computes where a job would."""
    yield checked("torch", lambda: computed(cfg.device, driver))


def checked(name: str, check: Callable[[], Part]) -> Part:
    """What a job would end with is fatal here."""
    try:
        return check()
    except (QuotesmithError, OSError) as e:
        return Part(name, "not usable", (Finding(True, str(e)),))


def require_usable(parts: list[Part]) -> None:
    """Raises `ConfigError` with every problem that was found."""
    problems = [finding.what for part in parts for finding in part.findings if finding.fatal]
    if problems:
        raise ConfigError(f"no job can run here: {'; '.join(problems)}")


def packages() -> Part:
    found, missing = [f"Python {python.python_version()}"], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    findings = (Finding(True, f"not installed: {', '.join(missing)}; install quotesmith anew"),) if missing else ()
    return Part("packages", ", ".join(found), findings)


def platform_of(platform: Platform, cfg: JobConfig) -> Part:
    nodes = cfg.nodes
    where = f"node {nodes.rank + 1} of {nodes.count}, " if nodes.count > 1 else ""
    return Part("platform", f"{platform.name}, {where}{cfg.grace_seconds:g} s from SIGTERM to SIGKILL")


def gpu_part(driver: Driver, build: Build, device: str, env: Mapping[str, str]) -> Part:
    built = f"torch for CUDA {dotted(build.cuda)}" if build.cuda else "torch without CUDA"
    known = f"driver {driver.version or 'of unknown version'} for CUDA {dotted(driver.cuda)}"
    gpus = [
        f"{gpu.name} ({gpu.memory_bytes / GB:.1f} GB, compute capability {dotted(gpu.capability)})"
        for gpu in driver.gpus
    ]
    found = ", ".join([*gpus, known, built]) if gpus else f"none, {built}"
    return Part("GPU", found, tuple(gpu_findings(driver, build, device, env)))


def tools(folder: str) -> Part:
    found = llama_cpp.find(folder)
    llama_cpp.require_programs_start(found)
    return Part("llama.cpp", f"{found.version}, {', '.join(llama_cpp.PROGRAMS)} start")


def work_folder(path: Path) -> Part:
    existed = path.exists()
    try:
        check_work_dir(path)
    except NotAllowed as e:
        return Part("work_dir", "not writable", (Finding(True, str(e), forbidden(path)),))
    free = shutil.disk_usage(path).free
    if not existed:
        path.rmdir()  # the job makes it
    return Part("work_dir", f"{path.absolute()}, writable by user {os.getuid()}, {room(free)}", little(free, path))


def forbidden(path: Path) -> tuple[str, ...]:
    """Why `path` cannot be written."""
    found = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    owner, user = found.stat().st_uid, os.getuid()
    causes = []
    if os.statvfs(found).f_flag & os.ST_RDONLY:
        causes.append(f"{found} is read-only; mount a volume for writing there")
    if owner != user:
        causes.append(
            f"{found} belongs to user {owner}, and this is user {user}; run as that user (docker's --user), give the "
            "volume to this one (a pod's fsGroup), or set work_dir to a folder of this user"
        )
    return tuple(causes)


def temporary_files() -> Part:
    """Where tools write their output and objects are read back."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as e:
        raise ConfigError("no folder for temporary files can be written; mount one at /tmp, or set TMPDIR") from e
    free = shutil.disk_usage(folder).free
    full = Finding(True, f"{folder} has no room for temporary files; make room, or set TMPDIR to a larger disk")
    return Part("/tmp", f"{folder}, {room(free)}", (full,) if free < LEAST_FREE_BYTES else ())


def little(free: int, path: Path) -> tuple[Finding, ...]:
    if free < LEAST_FREE_BYTES:
        return (Finding(True, f"the disk of work_dir {path} is full; free space, or set work_dir to a larger disk"),)
    if free < GPT2_DISK_BYTES:
        return (
            Finding(False, f"a job on GPT-2 needs {GPT2_DISK_BYTES / GB:.2f} GB there; a smaller model needs less"),
        )
    return ()


def shared_memory(root: Path) -> Part:
    folder = root / "dev/shm"
    try:
        size = shutil.disk_usage(folder).total
    except OSError:
        return Part("/dev/shm", "missing", (Finding(False, f"{folder} is missing; several GPUs need it"),))
    small = Finding(
        False,
        "that is less than docker's 64 MB, with which jobs on one GPU run; several GPUs need 1 GB",
        ("the container was started with a small --shm-size, or the pod's emptyDir with a small sizeLimit",),
    )
    return Part("/dev/shm", f"{size / 1e6:,.0f} MB", (small,) if size < SHM_BYTES else ())


def machine(root: Path) -> Part:
    available, limit = memory_available(root), memory_limit(root)
    has = f"{available / GB:.1f} GB" if available is not None else "unknown"
    limited = f", limited to {limit / GB:.1f} GB" if limit is not None else ", no limit"
    found = f"{has} of memory{limited}; {cores(root):g} CPU cores"
    if available is None or available >= GPT2_MEMORY_BYTES:
        return Part("machine", found)
    fatal = available < RUNTIME_BYTES
    least, any_job = GPT2_MEMORY_BYTES / GB, RUNTIME_BYTES / GB
    what = f"a job on GPT-2 needs at least {least:.1f} GB of memory, and none runs with less than {any_job:.1f} GB"
    return Part("machine", found, (Finding(fatal, what),))


def computed(device: str, driver: Driver) -> Part:
    """A product of two matrices, where a job would compute."""
    try:
        import torch

        from pipeline.device import choose_device, device_errors
    except (ImportError, OSError) as e:
        raise ConfigError(f"torch cannot be imported: {e}; install quotesmith anew, or build the image anew") from e
    chosen = choose_device(device)
    with device_errors("a first computation"):
        ones = torch.ones(64, 64, device=chosen.name)
        if (total := float((ones @ ones).sum())) != 64**3:
            raise ConfigError(
                f"a first computation on {chosen.name} gave {total} instead of {64**3}; take another machine"
            )
    unseen = chosen.name == "cpu" and device != "cpu" and bool(driver.gpus)
    findings = (unused(driver),) if unseen else ()
    return Part("torch", f"computes on {chosen.name} ({chosen.why})", findings)


def room(free: int) -> str:
    return f"{free / GB:.1f} GB free"
