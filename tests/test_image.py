"""The image as it is written: locks that agree, a clean Dockerfile, a build script that asks the builder for the right
thing. Building it is another test's work."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts.image_sizes import PIN

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILDER = """#!/bin/sh
[ "$1" = info ] && exit "${INFO_CODE:-0}"
printf '%s\\n' "$@" >"$0.arguments"
"""


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock):
    text = (ROOT / lock).read_text(encoding="utf-8")
    return {normal(name): (version, hashes.count("sha256:")) for name, version, hashes in PIN.findall(text)}


@pytest.fixture(params=["cuda", "cpu"])
def lock(request):
    return request.param, pins(f"scripts/image/{request.param}.lock")


def test_the_image_has_the_versions_that_the_tests_pass_with(lock):
    variant, locked = lock
    tested = {name: version for name, (version, _) in pins("requirements.lock").items()}
    local = "+cpu" if variant == "cpu" else ""
    for name, (version, _) in locked.items():
        if name in tested:
            assert version == tested[name] + (local if name == "torch" else ""), name
    assert len(set(locked) & set(tested)) > 70


def test_every_file_has_a_hash_and_every_requirement_a_pin(lock):
    _, locked = lock
    assert all(hashes for _, hashes in locked.values())
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["s3"]
    assert {normal(re.match(r"[\w.-]+", each)[0]) for each in wanted} <= set(locked)


def test_the_variants_differ_by_cuda_alone():
    cuda, cpu = (pins(f"scripts/image/{variant}.lock") for variant in ("cuda", "cpu"))
    assert all(re.match("nvidia-|cuda-", name) for name in set(cuda) - set(cpu)) and not set(cpu) - set(cuda)
    assert {name for name in cpu if cpu[name][0] != cuda[name][0]} == {"torch"}


def test_the_dockerfile_is_clean():
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if not hadolint:
        pytest.skip("no hadolint; the extra `dev` brings one")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_dockerfile_copies_is_sent_to_the_builder():
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [words for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M) for words in line.split()[:-1]]
    for path in (each.replace("${VARIANT}", "cuda") for each in copied):
        assert (ROOT / path).exists() and any(path == known or path.startswith(f"{known}/") for known in sent), path


def test_dependencies_come_before_the_program_and_the_program_runs_as_process_1_without_rights():
    assert DOCKERFILE.index("--require-hashes") < DOCKERFILE.index("COPY pipeline")
    assert re.search(r'^ENTRYPOINT \["/opt/venv/bin/python", "/opt/quotesmith/entrypoint.py"\]$', DOCKERFILE, re.M)
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.M)
    kept = DOCKERFILE.replace("--mount=type=secret", "")  # a mount is no part of the image
    assert not re.search("SECRET|TOKEN|PASSWORD", kept.upper())


def test_a_model_is_baked_in_at_the_revision_that_the_settings_pin():
    from pipeline.config import BASE_MODEL, BASE_REVISION

    assert f"ARG BASE_MODEL={BASE_MODEL}\nARG BASE_REVISION={BASE_REVISION}\n" in DOCKERFILE


@pytest.fixture
def build(tmp_path):
    def run(*args, builders=("docker",), **env):
        programs = tmp_path / "bin"
        programs.mkdir()
        for name in ("bash", "dirname", "git", "sed", "sh"):
            (programs / name).symlink_to(shutil.which(name))
        for name in builders:
            (programs / name).write_text(BUILDER)
            (programs / name).chmod(0o755)
        done = subprocess.run(
            [ROOT / "scripts" / "build_image.sh", *args],
            capture_output=True,
            text=True,
            env={"PATH": str(programs), **env},
        )
        asked = {name: programs / f"{name}.arguments" for name in builders}
        return done, {name: path.read_text().splitlines() for name, path in asked.items() if path.exists()}

    return run


def test_the_image_is_named_by_version_and_revision(build):
    done, asked = build("--target", "with-model", INDEX_URL="https://mirror/simple")
    assert done.returncode == 0, done.stderr
    words = asked["docker"]
    assert words[:5] == ["build", "--file", "Dockerfile", "--tag", f"quotesmith:{PROJECT['version']}-with-model"]
    assert words[-3:] == ["--target", "with-model", "."]
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert given["VARIANT"] == "cuda" and given["INDEX_URL"] == "https://mirror/simple"
    assert given["VERSION"] == PROJECT["version"] and re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", given["REVISION"])
    assert all(re.search(rf"^ARG {name}\b", DOCKERFILE, re.M) for name in given)


@pytest.mark.parametrize(
    ("args", "ending"), [((), "-cpu"), (("--target=sagemaker", "--tag", "x:--target"), "-cpu-sagemaker")]
)
def test_a_cpu_image_has_another_name_and_torchs_own_index(build, args, ending):
    _, asked = build(*args, builders=("podman", "buildah"), VARIANT="cpu")
    assert list(asked) == ["podman"] and f"quotesmith:{PROJECT['version']}{ending}" in asked["podman"]
    assert "EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" in asked["podman"]


def test_pips_own_settings_are_a_secret_of_the_build(build):
    _, asked = build(builders=("buildah",), VARIANT="cpu", PIP_CONFIG="/etc/pip.conf", EXTRA_INDEX_URL="")
    words = asked["buildah"]
    assert words[words.index("--secret") + 1] == "id=pip,src=/etc/pip.conf"
    assert not [word for word in words if word.startswith("EXTRA_INDEX_URL")]
    assert "type=secret,id=pip,target=/etc/pip.conf" in DOCKERFILE


def test_a_builder_whose_service_is_down_is_passed_over(build):
    done, asked = build(builders=("docker",), INFO_CODE="1")
    assert done.returncode == 1 and not asked and "no docker, podman or buildah that works" in done.stderr


def test_trimming_leaves_what_a_job_reads(tmp_path):
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    kept = ["torch/lib/libtorch.so", "bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so"]
    kept += ["numpy/testing/__init__.py", "nvidia/cu13/lib/libcublas.so"]
    gone = ["torch/include/a.h", "torch/test/cpp", "bitsandbytes/libbitsandbytes_cuda128.so", "numpy/core/tests/a.py"]
    gone += [
        "bitsandbytes/libbitsandbytes_rocm72.so",
        "nvidia/cu13/include/a.h",
        "torch/lib/libx.a",
        "sympy/tests/a.py",
    ]
    for path in (*kept, *gone, "networkx/a.py", "bin/python"):
        place = packages / path if path != "bin/python" else tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("")
    (packages / "torch/version.py").write_text("cuda: Optional[str] = '13.0'\n")
    (tmp_path / "bin/python").write_text("#!/bin/sh\n")
    (tmp_path / "bin/python").chmod(0o755)
    done = subprocess.run([ROOT / "scripts/image/trim.sh", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all((packages / path).exists() for path in kept)
    assert not [path for path in gone if (packages / path).exists()]
