import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import entrypoint
from pipeline.errors import QuotesmithError
from pipeline.settings import all_settings

ROOT = Path(entrypoint.__file__).parent


def command(*args, **env):
    return subprocess.run(
        [sys.executable, ROOT / "entrypoint.py", *args], capture_output=True, text=True, env={**os.environ, **env}
    )


@pytest.mark.parametrize(
    "name", [[], ["run"], ["train"], ["plan"], ["config"], ["render"], ["generate"], ["verify"], ["self-test"]]
)
def test_help_imports_neither_torch_nor_transformers(name):
    script = (
        "import sys, click.testing, entrypoint as e;"
        f"r = click.testing.CliRunner().invoke(e.cli, {[*name, '--help']!r}); assert r.exit_code == 0, r;"
        "assert not {'torch', 'transformers', 'numpy', 'google.cloud.storage'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_every_setting_is_an_option_of_run_plan_config_and_render():
    for name in ("run", "train", "plan", "config", "render", "self-test"):
        text = CliRunner().invoke(entrypoint.cli, [name, "--help"]).output
        assert all(setting.flag in text for setting in all_settings()), name


def test_config_prints_values_and_where_they_come_from():
    done = command("config", "--json", "--train.epochs", "3", QUOTESMITH_TRAIN_BATCH_SIZE="8")
    rows = {row["key"]: row for row in json.loads(done.stdout)}
    assert (rows["train.epochs"]["value"], rows["train.epochs"]["origin"]) == (3.0, "flag --train.epochs")
    assert rows["train.batch_size"]["value"] == 8
    assert rows["seed"]["origin"] == "default"


@pytest.mark.parametrize("more", [["--json"], []])
def test_config_prints_no_secret_of_a_setting(more):
    signed, keyed = "https://bucket/quotes.txt?X-Amz-Signature=s3cr3tV4lue", "s3://KEY:s3cr3tV4lue@bucket/x"
    done = command("config", *more, "--input", signed, "--tensorboard", keyed)
    assert done.returncode == 0 and "s3cr3tV4lue" not in done.stdout
    assert "X-Amz-Signature=[secret]" in done.stdout and "s3://[secret]bucket/x" in done.stdout


@pytest.mark.parametrize(
    ("args", "env", "code", "sentence"),
    [
        (["run", "--train.epoch", "3"], {}, 2, "--train.epochs"),
        (["dance"], {}, 2, "No such command"),
        (["config", "--train.epochs", "0"], {}, 78, "train.epochs is '0'"),
        (["config"], {"QUOTESMITH_SED": "1"}, 78, "did you mean QUOTESMITH_SEED"),
        (["config", "--config", "nowhere.yaml"], {}, 66, "nowhere.yaml"),
        (["generate", "x.gguf", "--max-new-tokens", "5000000000"], {}, 2, "x.gguf"),
        (["generate", str(ROOT / "pyproject.toml"), "--temperature", "1e39"], {}, 78, "temperature"),
        (["config", "--evaluate.prompts", "[]"], {}, 78, "evaluate.prompts"),
        (["generate", "nowhere.gguf"], {}, 2, "nowhere.gguf"),
        (["generate", str(ROOT / "pyproject.toml")], {}, 65, "not a GGUF file"),
        (["verify", "nowhere"], {}, 66, "nothing has been published there"),
    ],
)
def test_bad_usage_ends_with_its_code_and_one_sentence(args, env, code, sentence):
    done = command(*args, **env)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_a_gpu_that_is_not_there_ends_a_run_before_anything_is_spent(tmp_path):
    places = ("--output", tmp_path / "out", "--work-dir", tmp_path / "work")
    done = command("run", "--device", "cuda", *places, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 69 and "no GPU is visible" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", QuotesmithError.__subclasses__())
def test_every_error_ends_with_its_own_code(error, capsys):
    def breaks():
        raise error("found this, needed that, do so")

    assert entrypoint.exit_code_of(breaks) == error.exit_code
    assert "Traceback" not in capsys.readouterr().err


def test_what_an_error_repeats_of_a_file_obeys_no_terminal(capsys):
    def breaks():
        raise QuotesmithError("found \x1b[2J\x07 in\nline 1, needed\ttext")

    entrypoint.exit_code_of(breaks)
    assert capsys.readouterr().err == "error: found [2J in line 1, needed text\n"


def test_a_bug_of_ours_shows_its_traceback(capsys):
    def breaks():
        raise ZeroDivisionError

    assert entrypoint.exit_code_of(breaks) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (entrypoint.Stopped, 143)])
def test_a_signal_is_never_success(error, code, capsys):
    def breaks():
        raise error

    assert entrypoint.exit_code_of(breaks) == code
    assert "keeps its finished stages" in capsys.readouterr().err


def test_a_full_disk_is_the_machines_fault(capsys):
    def breaks():
        raise OSError(28, "No space left on device", "model.safetensors")

    assert entrypoint.exit_code_of(breaks) == 71
    assert "model.safetensors" in capsys.readouterr().err
