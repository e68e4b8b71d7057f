import hashlib
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "build_llama_cpp.sh"


def build(cache, **environment):
    """The script with an empty or prepared cache; never a real build: each test stops it before, or it is done."""
    return subprocess.run(
        ["bash", SCRIPT],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def without_tools(folder):
    """A PATH with a cmake and a ninja that are never come to, so that none are installed first."""
    folder.mkdir()
    for name in ("cmake", "ninja"):
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_build_that_is_there_is_not_made_again(llama_cpp):
    """With no compiler and no Python to be found: whatever ran would fail."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    done = build(cache, CC="", CXX="", PYTHON="/nonexistent")
    if done.returncode and "no pip" in done.stderr:
        pytest.skip("the build in the cache is of another version of the script")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("llama.cpp: ready in ")


@pytest.mark.parametrize("given", [True, False])
def test_a_source_with_another_hash_is_refused(tmp_path, given):
    cached = tmp_path / "quotesmith" / "llama.cpp" / "llama_cpp_python-0.3.36.tar.gz"
    wrong = tmp_path / "wrong.tar.gz" if given else cached
    wrong.parent.mkdir(parents=True, exist_ok=True)
    wrong.write_bytes(b"something else")
    path = without_tools(tmp_path / "bin")
    done = build(tmp_path, PATH=path, **({"LLAMA_CPP_SDIST": str(wrong)} if given else {}))
    assert done.returncode == 1
    assert f"{wrong} has sha256 {hashlib.sha256(b'something else').hexdigest()}" in done.stderr
    assert "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e" in done.stderr
    assert not (tmp_path / "quotesmith" / "llama.cpp" / "current").exists()


def test_a_missing_compiler_is_told_with_what_to_install(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler", PATH=without_tools(tmp_path / "bin"))
    assert done.returncode == 1
    assert "no C++ compiler (no-such-compiler) found; install one" in done.stderr


def test_nothing_half_built_is_left_behind(tmp_path):
    build(tmp_path, LLAMA_CPP_SDIST=str(tmp_path / "absent"), PATH=without_tools(tmp_path / "bin"))
    left = {path.name for path in (tmp_path / "quotesmith" / "llama.cpp").iterdir()}
    assert left == {"build.log"}
