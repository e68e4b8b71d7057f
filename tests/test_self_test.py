"""The command itself on this machine, and on machines that lack something: real ones where the kernel lets us make
them, else folders that stand for theirs."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

import entrypoint
from pipeline import self_test
from pipeline.artifacts import Checkpoint
from pipeline.cuda_driver import Build, Driver, Gpu
from pipeline.errors import ConfigError
from pipeline.finding import Finding
from pipeline.room import disk_needed, memory_needed, released_beside
from pipeline.self_test import Part, gpu_part, require_usable
from pipeline.settings import resolve

ROOT = Path(entrypoint.__file__).parent
# A tmpfs over a folder, in a mount namespace of its own.
OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
NO_TORCH = "import sys; sys.modules['torch'] = None; import entrypoint; entrypoint.main()"


def command(*arguments, before=(), cwd=None, code=None, **env):
    start = [sys.executable, "-c", code] if code else [sys.executable, str(ROOT / "entrypoint.py")]
    given = {name: value for name, value in os.environ.items() if not name.startswith(("QUOTESMITH_", "NVIDIA_"))}
    given |= {"PYTHONPATH": str(ROOT), **env}
    return subprocess.run([*before, *start, *arguments], capture_output=True, text=True, cwd=cwd, env=given)


def mounted(line):
    """A command that does `line` in its own mounts first; skips where the system allows none."""
    if not shutil.which("unshare") or subprocess.run([*OWN_MOUNTS, line], capture_output=True).returncode:
        pytest.skip("this system allows no mounts of one's own")
    return [*OWN_MOUNTS, f'{line} && exec "$@"', "sh"]


def test_on_this_machine_a_job_can_run(llama_cpp, tmp_path):
    done = command("--self-test", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "a job can run here" and lines[-2].startswith("torch      computes on c")
    for part in ("quotesmith", "packages", "platform", "GPU", "llama.cpp", "work_dir", "/tmp", "/dev/shm", "machine"):
        assert any(line.startswith(f"{part} ") for line in lines), done.stdout
    assert llama_cpp.version in done.stdout and f"user {os.getuid()}" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_was_promised_and_is_not_there_is_said_without_torch(llama_cpp, tmp_path):
    promised = command("self-test", cwd=tmp_path, code=NO_TORCH, NVIDIA_VISIBLE_DEVICES="all", CUDA_VISIBLE_DEVICES="")
    asked = command("--self-test", "--device", "cuda", cwd=tmp_path, code=NO_TORCH, CUDA_VISIBLE_DEVICES="")
    for done in (promised, asked):
        assert done.returncode == 78 and "Traceback" not in done.stderr, done.stderr
        assert "    1. " in done.stdout and "error: no job can run here: " in done.stderr


def test_a_gpu_is_found_through_the_drivers_library(libcuda, llama_cpp, tmp_path):
    if torch.version.cuda:
        pytest.skip("this torch would take the library for a driver")
    answers = {"LD_LIBRARY_PATH": str(libcuda.parent), "CUDA_KNOWN": "12040", "NVIDIA_VISIBLE_DEVICES": "all"}
    done = command("self-test", cwd=tmp_path, code=NO_TORCH, **answers)
    assert done.returncode == 78, done.stderr
    assert "GPU        NVIDIA L4 (24.0 GB, compute capability 8.9), driver" in done.stdout
    assert "for CUDA 12.4, torch without CUDA\n  problem: this torch was built without CUDA" in done.stdout


def test_a_torch_that_cannot_be_imported_is_a_problem(llama_cpp, tmp_path):
    done = command("self-test", cwd=tmp_path, code=NO_TORCH)
    assert done.returncode == 78 and "torch cannot be imported" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--train.epochs", "0"], 78, "train.epochs is '0'"),
        (["--dance"], 2, "No such option"),
        (["--llama-cpp", "/nowhere"], 78, "the llama.cpp tools are not in /nowhere"),
        (["--work-dir", "/proc/work"], 78, "work_dir /proc/work cannot be"),
    ],
)
def test_what_would_end_every_job_ends_the_self_test(arguments, code, sentence, tmp_path):
    done = command("--self-test", *arguments, cwd=tmp_path)
    assert done.returncode == code and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_program_for_another_machine_is_told(llama_cpp, tmp_path):
    shutil.copytree(llama_cpp.root, tmp_path / "tools", symlinks=True)
    program = tmp_path / "tools/bin/llama-probe"
    for content, sentence in ((b"\x7fELF\2\1\1" + bytes(99), "Exec format"), (b"#!/bin/sh\nkill -ILL $$\n", "AVX2")):
        program.unlink()
        program.write_bytes(content)
        program.chmod(0o755)
        done = command("--self-test", "--llama-cpp", str(tmp_path / "tools"), cwd=tmp_path)
        assert done.returncode == 78 and sentence in done.stderr and "llama-probe" in done.stderr, done.stderr


def test_a_work_folder_that_cannot_be_written_is_a_problem(llama_cpp, tmp_path):
    read_only = mounted(f"mount -t tmpfs -o ro tmpfs {tmp_path}")
    done = command("--self-test", "--work-dir", str(tmp_path), before=read_only)
    assert done.returncode == 78 and f"work_dir {tmp_path} cannot be written" in done.stderr, done.stderr
    assert f"    1. {tmp_path} is read-only; mount a volume" in done.stdout


def report_of(part, before):
    """Code that prints the lines of a part after it did what comes before."""
    return f"import os, pathlib, sys; from pipeline import self_test; {before}; print(*{part}.lines(), sep={chr(10)!r})"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_work_folder_of_another_user_is_told_with_both_users():
    with tempfile.TemporaryDirectory() as volume:  # pytest's own folders are closed to others
        Path(volume).chmod(0o755)
        code = report_of("self_test.work_folder(pathlib.Path(sys.argv[1]))", "os.setuid(65534)")
        done = command(f"{volume}/work", code=code)
    assert "cannot be made (Permission denied)" in done.stdout, done.stderr
    assert f"1. {volume} belongs to user 0, and this is user 65534; run as that user" in done.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_without_a_home_is_told_what_is_missing_and_not_a_traceback():
    tools = "self_test.checked('llama.cpp', lambda: self_test.tools(''))"
    done = command(code=report_of(tools, "del os.environ['HOME']; os.setuid(12345)"), cwd="/")
    assert "problem: the llama.cpp tools are not in /" in done.stdout, done.stderr


def test_no_room_for_temporary_files_is_a_problem(llama_cpp, tmp_path):
    small = mounted(f"mount -t tmpfs -o size=64k tmpfs {tmp_path}")
    done = command("--self-test", before=small, TMPDIR=str(tmp_path))
    assert done.returncode == 78 and f"{tmp_path} has no room for temporary files" in done.stderr, done.stderr


def test_a_tiny_shared_memory_is_a_remark(llama_cpp, tmp_path):
    done = command("--self-test", before=mounted("mount -t tmpfs -o size=1m tmpfs /dev/shm"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "/dev/shm   1 MB\n  remark: that is less than docker's 64 MB" in done.stdout
    assert self_test.shared_memory(tmp_path).findings[0].what.endswith("is missing; several GPUs need it")


def test_too_little_memory_is_a_problem_and_little_a_remark(tmp_path):
    limit = tmp_path / "sys/fs/cgroup/memory.max"
    for path in (limit, tmp_path / "proc/meminfo"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("MemAvailable: 64000000 kB\n")
    assert self_test.machine(tmp_path).findings == ()
    limit.write_text("1000000000")
    assert [finding.fatal for finding in self_test.machine(tmp_path).findings] == [False]
    limit.write_text("400000000")
    (short,) = self_test.machine(tmp_path).findings
    assert short.fatal and "limited to 0.4 GB" in self_test.machine(tmp_path).found


def test_the_figures_for_gpt2_are_what_a_job_asks_for(tmp_path):
    base, flags = tmp_path / "gpt2", {"work_dir": str(tmp_path), "output": str(tmp_path / "out")}
    base.mkdir()
    GPT2Config().save_pretrained(base)
    with (base / "model.safetensors").open("wb") as file:
        file.truncate(4 * 124_439_808)  # sparse
    checkpoint, cfg = Checkpoint(base, "hash"), resolve(flags, {}).config
    disk = sum(disk_needed(checkpoint, cfg).values()) + released_beside(checkpoint, cfg)
    assert disk == pytest.approx(self_test.GPT2_DISK_BYTES, rel=0.02)
    assert memory_needed(checkpoint, cfg) == pytest.approx(self_test.GPT2_MEMORY_BYTES, rel=0.02)


def test_a_gpu_is_described_with_its_driver_and_what_torch_was_built_for():
    driver = Driver((), "580.65.06", True, True, 0, (13, 0), (Gpu("NVIDIA L4", (8, 9), 24_000_000_000),))
    part = gpu_part(driver, Build((13, 0), ("sm_89",)), "auto", {})
    assert part.found == (
        "NVIDIA L4 (24.0 GB, compute capability 8.9), driver 580.65.06 for CUDA 13.0, torch for CUDA 13.0"
    )
    assert part.findings == ()


def test_a_gpu_that_the_driver_shows_and_torch_does_not_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shown = Driver((), "580.65.06", True, True, 0, (13, 0), (Gpu("NVIDIA L4", (8, 9), 24_000_000_000),))
    (finding,) = self_test.computed("auto", shown).findings
    assert not finding.fatal and "torch does not see NVIDIA L4" in finding.what
    assert self_test.computed("auto", Driver()).findings == self_test.computed("cpu", shown).findings == ()


def test_every_problem_is_in_the_one_sentence():
    bad = [Finding(True, "no disk"), Finding(False, "slow"), Finding(True, "no tools")]
    with pytest.raises(ConfigError, match=r"no job can run here: no disk; no tools$"):
        require_usable([Part("a", "", tuple(bad[:2])), Part("b", "", tuple(bad[2:]))])
    require_usable([Part("a", "", (bad[1],))])
