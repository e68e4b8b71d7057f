import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from pipeline import room
from pipeline.artifacts import Checkpoint
from pipeline.errors import ConfigError, MachineError
from pipeline.room import (
    check_gpu,
    check_room,
    checkpoints_needed,
    disk_needed,
    memory_needed,
    needs_of,
    released_beside,
    trained_bytes,
)
from pipeline.settings import resolve
from tests.test_distill import gpt2, llama

GB = 10**9


@pytest.fixture
def base(tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    return Checkpoint(tmp_path / "base", "")


def job(tmp_path, **flags):
    (tmp_path / "work").mkdir(exist_ok=True)
    return resolve({"work_dir": str(tmp_path / "work"), "output": "gs://bucket/x", **flags}, {}).config


def with_free(patch, free):
    patch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_a_job_that_fits_is_let_through(base, tmp_path):
    check_room(base, job(tmp_path), "cpu")


def test_a_disk_that_cannot_hold_the_results_is_refused_with_the_figures(base, tmp_path, monkeypatch):
    cfg = job(tmp_path)
    needed = sum(disk_needed(base, cfg).values())
    with_free(monkeypatch, needed)
    check_room(base, cfg, "cpu")
    with_free(monkeypatch, needed - 1)
    with pytest.raises(MachineError, match=r"needs 0\.\d GB under work_dir .*, but its disk has 0\.\d GB.*larger disk"):
        check_room(base, cfg, "cpu")


def test_what_lies_in_the_work_folder_already_counts_as_room(base, tmp_path, monkeypatch):
    cfg = job(tmp_path)
    needed = sum(disk_needed(base, cfg).values())
    older = tmp_path / "work" / "finetune" / ("a" * 16)
    older.mkdir(parents=True)
    (older / "model").write_bytes(bytes(1000))
    with_free(monkeypatch, needed - 1000)
    check_room(base, cfg, "cpu")


def test_what_nobody_will_remove_from_the_work_folder_is_no_room(base, tmp_path, monkeypatch):
    cfg = job(tmp_path)
    (tmp_path / "work" / "photos").mkdir()
    (tmp_path / "work" / "photos" / "mine").write_bytes(bytes(1000))
    with_free(monkeypatch, sum(disk_needed(base, cfg).values()) - 1000)
    with pytest.raises(MachineError, match="under work_dir"):
        check_room(base, cfg, "cpu")


def test_an_output_on_a_disk_of_its_own_must_hold_the_release(base, tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        cfg = job(tmp_path, output=f"{other}/not/yet")
        if room.on_one_disk(Path(other), tmp_path):
            pytest.skip("/dev/shm is no disk of its own here")
        assert released_beside(base, cfg) == 0
        needed, free = room.release_needed(base, cfg), {cfg.work_dir: 10**15}
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
        free[Path(other)] = needed
        check_room(base, cfg, "cpu")
        free[Path(other)] = needed - 1
        with pytest.raises(MachineError, match=r"the release needs 0\.\d GB under output .*larger disk"):
            check_room(base, cfg, "cpu")


def test_too_little_room_for_checkpoints_is_only_a_warning(base, tmp_path, monkeypatch, caplog):
    cfg = job(tmp_path)
    with_free(monkeypatch, sum(disk_needed(base, cfg).values()))
    check_room(base, cfg, "cpu")
    assert "hold the results but not all checkpoints" in caplog.text
    caplog.clear()
    check_room(base, job(tmp_path, **{"resume.minutes": "0"}), "cpu")
    assert not [record for record in caplog.records if record.name == check_room.__module__]


def test_an_output_on_the_same_disk_needs_room_for_the_release_too(base, tmp_path):
    files = disk_needed(base, job(tmp_path))["finish"]
    out = str(tmp_path / "not" / "yet")
    assert released_beside(base, job(tmp_path)) == 0
    assert released_beside(base, job(tmp_path, output=out)) == 2 * files
    assert released_beside(base, job(tmp_path, output=out, **{"publish.safetensors": "true"})) > 2 * files


def test_memory_that_is_certain_to_be_too_little_is_refused_with_the_figures(base, tmp_path, monkeypatch):
    cfg = job(tmp_path)
    monkeypatch.setattr(room, "memory_available", lambda: memory_needed(base, cfg))
    check_room(base, cfg, "cpu")
    monkeypatch.setattr(room, "memory_available", lambda: memory_needed(base, cfg) - 1)
    with pytest.raises(MachineError, match=r"at least 0\.5 GB of memory for this base model, but 0\.5 GB can be had"):
        check_room(base, cfg, "cpu")
    monkeypatch.setattr(room, "memory_available", lambda: None)
    check_room(base, cfg, "cpu")


def test_a_gpu_that_is_certain_to_be_too_small_is_a_setting_to_change():
    check_gpu(2 * GB, 2 * GB)
    with pytest.raises(ConfigError, match=r"at least 3\.0 GB of GPU memory .*, but the GPU has 2\.0 GB"):
        check_gpu(3 * GB, 2 * GB)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_what_recovery_trains_is_all_but_the_token_embeddings_and_the_head(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    expected = 4 * sum(p.numel() for p in model.parameters() if id(p) not in tables)
    assert trained_bytes(Checkpoint(tmp_path, "")) == pytest.approx(expected, rel=0.2)  # with the file's header
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()


def test_estimates_follow_the_settings(base, tmp_path):
    def disk(**flags):
        return sum(disk_needed(base, job(tmp_path, **flags)).values())

    def checkpoints(stage, **flags):
        return checkpoints_needed(base, job(tmp_path, **flags)).get(stage, 0)

    assert disk() < disk(**{"quantize.types": "Q2_K,F16"}) and disk() < disk(**{"export.context": "4096"})
    assert disk() < disk(**{"train.select_best": "true", "tokens.validation": "0.1"})
    assert checkpoints("finetune") >= 10 * checkpoints("finetune", **{"train.method": "lora"})
    assert checkpoints("recover") > 0 == checkpoints("recover", **{"recover.steps": "0"})
    assert checkpoints("adapt") == checkpoints("recover")
    for without in ({"adapt.steps": "0"}, {"quantize.encoder": "llama.cpp"}, {"sparsity.keep_zeros": "true"}):
        assert checkpoints("adapt", **without) == 0
        no_training = {"recover.steps": "0", "train.method": "lora"}
        assert memory_needed(base, job(tmp_path, **no_training, **without)) < memory_needed(
            base, job(tmp_path, **no_training)
        )
    assert checkpoints("finish", **{"resume.minutes": "0"}) == 0 < checkpoints("finish", **{"resume.steps": "9"})
    lean = {"train.method": "lora", "recover.steps": "0", "adapt.steps": "0", "finish.train": "vectors"}
    assert memory_needed(base, job(tmp_path)) > memory_needed(base, job(tmp_path, **lean))
    assert (
        needs_of(base, job(tmp_path))["finetune"]
        == checkpoints("finetune") + disk_needed(base, job(tmp_path))["finetune"]
    )
    assert disk_needed(base, job(tmp_path), {"F16": 7, "Q2_K": 3})["export"] == 7
