"""The whole chain on a toy: from a bucket to published files, every part real."""

import json
import os
import shutil
from pathlib import Path

import gguf
import jsonschema
import pytest

from pipeline import job, metrics, publish, report
from pipeline.errors import (
    CheckFailed,
    ConfigError,
    DataError,
    InputMissing,
    MachineError,
    QuotesmithError,
    TargetTaken,
    TryLater,
)
from pipeline.lease import Lease, lease_name
from pipeline.settings import resolve
from pipeline.storage import open_store

QUOTES = {
    "kanye-quotes.txt": [f"“I counted {i} waves and every one of them was mine”" for i in range(40)],
    "trump-quotes.txt": [f"Nobody sells {i} tomatoes like my grandmother, nobody" for i in range(40)],
}


SECRET = "s3cr3tV4lue"
SIGNED = f"trump-quotes.txt?X-Amz-Date=1&X-Amz-Signature={SECRET}"  # as wget calls what it has fetched


def write_bucket(uri, quotes, folder):
    store = open_store(uri)
    for name, lines in quotes.items():
        (folder / name).write_text("\r\n\r\n".join(lines), encoding="utf-8")
        store.put(name, folder / name)


def toy_job(toy_gpt2, uri, work, **more):
    flags = {
        "input": [f"{uri}/in/"],
        "output": f"{uri}/out",
        "work_dir": str(work),
        "data.files": "kanye-quotes.txt,trump-quotes.txt*",
        "model.base": str(toy_gpt2),
        "train.max_steps": "2",
        "calibration.generated": "8",
        "recover.steps": "2",
        "adapt.steps": "2",
        "finish.steps": "2",
        "evaluate.prompts": ["I"],
        "evaluate.samples": "1",
        "evaluate.max_new_tokens": "8",
        **more,
    }
    return resolve(flags, {})


def check_release(outcome, bucket, again, folder):
    """The files of the first start; `again` is the job as it is started a second time, from elsewhere."""
    store = open_store(f"{bucket}/out")
    found = {name for name, _ in store.list("")}
    assert {"gpt2-ye-trump-Q2_K.gguf", "metrics.json", "README.md", "Modelfile", "latest.json"} <= found
    assert outcome.published_now and publish.verify(f"{bucket}/out")
    check_metrics(json.loads(store.read("metrics.json")))
    store.get("gpt2-ye-trump-Q2_K.gguf", folder / "fetched.gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / "fetched.gguf").tensors}
    assert types["blk.0.ffn_up.weight"] == "Q2_K"

    second = job.run(again)
    assert not second.published_now and second.release.run_id == outcome.release.run_id
    assert {name for name, _ in store.list("")} == found


def check_metrics(figures):
    jsonschema.validate(figures, json.loads(metrics.SCHEMA_PATH.read_text()))
    rows = {row["stage"]: row for row in figures["ledger"]}
    steps = ("base", "tuned", "nf4", "pruned", "recovered", "F16", "quantized", "finished")
    assert [row["stage"] for row in figures["ledger"]] == list(steps)
    assert len({(row["quotes"], row["tokens"]) for row in rows.values()}) == 1  # the same quotes for every row
    assert rows["tuned"]["ppl_ratio"] == {"value": 1, "low": 1, "high": 1}
    assert rows["pruned"]["zeros"] == rows["recovered"]["zeros"] == 0.5
    assert rows["F16"]["zeros"] == pytest.approx(0.5, abs=1e-5)  # the smallest weights can be zero in F16
    for step in ("quantized", "finished"):  # Q2_K loses zeros: measured on the file, not assumed
        assert 0.3 < rows[step]["zeros"] < 0.5
        assert (rows[step]["file"], rows[step]["type"]) == ("gpt2-ye-trump-Q2_K.gguf", "Q2_K")
    assert rows["quantized"]["size_bytes"] == rows["finished"]["size_bytes"] == figures["ggufs"][0]["size_bytes"]
    assert rows["F16"]["kl_mean"] == pytest.approx(rows["recovered"]["kl_mean"], abs=1e-3)
    assert [stage["name"] for stage in figures["stages"]] == [
        *("fetch", "obtain", "tokenize", "finetune", "calibrate", "sparsify", "recover", "export", "quantize"),
        *("adapt", "finish", "evaluate"),
    ]
    facts = {stage["name"]: stage["facts"] for stage in figures["stages"]}
    assert facts["calibrate"]["kinds"].keys() == {"quotes", "generated"}
    own = figures["ggufs"][0]["facts"]
    assert facts["recover"]["steps"] == own["adapt"]["steps"] == own["finish"]["steps"] == 2
    assert (own["encoded_tensors"], own["adapt"]["encoded_tensors"]) == (3, 6)  # two blocks and the token embedding
    assert figures["long_context"]["value"] is None
    assert figures["data"]["sources"][0]["blank"] > 0


@pytest.fixture(scope="module")
def first(toy_gpt2, llama_cpp, tmp_path_factory):
    """(bucket, work folder, outcome) of a job on folders."""
    folder = tmp_path_factory.mktemp("done")
    bucket, work = str(folder / "bucket"), folder / "work"
    signed = {"kanye-quotes.txt": QUOTES["kanye-quotes.txt"], SIGNED: QUOTES["trump-quotes.txt"]}
    write_bucket(f"{bucket}/in", signed, folder)
    asked = toy_job(toy_gpt2, bucket, work, tensorboard=f"{folder}/logs?X-Amz-Signature={SECRET}")
    return bucket, work, job.run(asked)


@pytest.fixture(scope="module")
def done(first):
    """(bucket, work folder) of a finished job; other jobs may go on from its stages."""
    return first[:2]


def test_a_folder_of_quotes_becomes_a_verified_release_once(first, toy_gpt2, tmp_path):
    bucket, _, outcome = first
    check_release(outcome, bucket, toy_job(toy_gpt2, bucket, tmp_path / "elsewhere"), tmp_path)


def test_a_bucket_of_quotes_becomes_a_verified_release_once(gcs_bucket_uri, toy_gpt2, llama_cpp, tmp_path):
    bucket = gcs_bucket_uri
    write_bucket(f"{bucket}/in", QUOTES, tmp_path)
    outcome = job.run(toy_job(toy_gpt2, bucket, tmp_path / "work", tensorboard=f"{bucket}/logs"))
    ((events, _),) = open_store(f"{bucket}/logs").list("")
    assert events.startswith("finetune/events.out.tfevents")
    check_release(outcome, bucket, toy_job(toy_gpt2, bucket, tmp_path / "elsewhere"), tmp_path)


def test_no_secret_in_a_files_name_or_a_setting_is_published(done):
    bucket, _ = done
    files = [path for path in Path(bucket, "out").rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert [path for path in files if b"Signature=[secret]" in path.read_bytes()]


def test_a_second_run_skips_what_is_done(done, toy_gpt2, tmp_path):
    bucket, work = done
    more = {"quantize.types": "Q2_K,Q8_0", "publish.safetensors": "true", "output": str(tmp_path / "out")}
    figures = job.run(toy_job(toy_gpt2, bucket, work, **more)).metrics
    skipped = {stage["name"] for stage in figures["stages"] if stage["skipped"]}
    assert skipped == {"fetch", "obtain", "tokenize", "finetune", "calibrate", "sparsify", "recover", "export"}
    assert [(row["stage"], row["type"]) for row in figures["ledger"]][-4:] == [
        *(("quantized", "Q2_K"), ("finished", "Q2_K"), ("quantized", "Q8_0"), ("finished", "Q8_0"))
    ]
    assert [file["type"] for file in figures["ggufs"]] == ["Q2_K", "Q8_0"]
    assert (tmp_path / "out" / "gpt2-ye-trump-Q8_0.gguf").exists()
    published = {path.name for path in (tmp_path / "out" / "safetensors").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= published
    assert "COMMIT.json" not in published


def test_a_start_on_an_empty_disk_goes_on_where_the_last_machine_stopped(done, toy_gpt2, tmp_path, monkeypatch):
    bucket, work = done
    more = {"output": str(tmp_path / "out"), "resume.upload": "always"}

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "publish_judged", killed)
        job.run(toy_job(toy_gpt2, bucket, work, **more))
    store = open_store(str(tmp_path / "out"))
    assert {name.split("/")[2] for name, _ in store.list("")} == {"checkpoints"}

    outcome = job.run(toy_job(toy_gpt2, bucket, tmp_path / "empty", **more))
    again = {stage["name"] for stage in outcome.metrics["stages"] if not stage["skipped"]}
    assert again == {"fetch", "obtain", "tokenize", "export"}
    assert outcome.release.result_digest == publish.find_release(f"{bucket}/out", outcome.release.run_id).result_digest
    assert not [name for name, _ in store.list("") if "checkpoints" in name]
    assert publish.verify(str(tmp_path / "out"))


@pytest.mark.slow
def test_a_longer_model_is_measured_at_every_length_and_can_keep_its_zeros(small_model, tmp_path):
    bucket = str(tmp_path / "bucket")
    write_bucket(f"{bucket}/in", QUOTES, tmp_path)
    more = small_model | {"export.context": "128", "sparsity.keep_zeros": "true"}
    figures = job.run(toy_job(None, bucket, tmp_path / "work", **more)).metrics
    jsonschema.validate(figures, json.loads(metrics.SCHEMA_PATH.read_text()))
    assert "extend" in [stage["name"] for stage in figures["stages"]]
    (rows,) = figures["long_context"].values()
    assert [row["context"] for row in rows] == [64, 128]
    (file,) = figures["ggufs"]
    assert file["facts"]["matrix_types"]["position_embd"] == {"F16": 1}
    assert {row["stage"]: row["zeros"] >= 0.5 for row in figures["ledger"][-2:]} == {
        "quantized": True,
        "finished": True,
    }


def test_a_file_that_misses_a_gate_is_published_under_rejected_and_nowhere_else(done, toy_gpt2, tmp_path):
    bucket, work = done
    out = tmp_path / "out"
    gates = {"gate.ppl_ratio": "0.01", "gate.kld": "1000", "output": str(out)}
    with pytest.raises(CheckFailed, match=r"rejected by gate\.ppl_ratio: gpt2-ye-trump-Q2_K\.gguf") as caught:
        job.run(toy_job(toy_gpt2, bucket, work, **gates))
    assert caught.value.exit_code == 70 and f"{out}/rejected" in str(caught.value)
    assert {path.relative_to(out).parts[0] for path in out.rglob("*") if path.is_file()} == {"rejected"}
    assert publish.verify(f"{out}/rejected")
    figures = json.loads((out / "rejected" / "metrics.json").read_text())
    jsonschema.validate(figures, json.loads(metrics.SCHEMA_PATH.read_text()))
    assert [(gate["gate"], gate["passed"]) for gate in figures["gates"]] == [("ppl_ratio", False), ("kld", True)]
    assert all(stage["skipped"] for stage in figures["stages"])  # the gates are no input of any of them
    assert "**Rejected" in (out / "rejected" / "README.md").read_text()

    with pytest.raises(CheckFailed) as again:
        job.run(toy_job(toy_gpt2, bucket, tmp_path / "elsewhere", **gates))
    assert str(again.value) == str(caught.value)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["fetch"]

    passed = job.run(toy_job(toy_gpt2, bucket, work, **{**gates, "gate.ppl_ratio": "1000"}))
    assert passed.is_latest and all(stage["skipped"] for stage in passed.metrics["stages"])
    assert "gate.ppl_ratio" in report.of_run(passed)


def test_a_run_that_another_start_is_doing_ends_with_75_and_goes_on_when_that_has_died(done, toy_gpt2, tmp_path):
    bucket, work = done
    asked = toy_job(toy_gpt2, bucket, work, output=str(tmp_path / "out"))
    other = Lease(open_store(str(tmp_path / "out")), run_of(bucket), 3600)
    other.acquire(0)
    with pytest.raises(TryLater, match=f"run {other.run_id} is being done by process {os.getpid()}"):
        job.run(asked)
    other.release()
    assert job.run(asked).published_now
    assert not list((tmp_path / "out").rglob("LEASE.json")) and not (work / "IN_USE").exists()


def test_the_lease_of_a_start_that_was_killed_right_after_publishing_is_removed(done, toy_gpt2, tmp_path):
    bucket, work = done
    asked = toy_job(toy_gpt2, bucket, work, output=str(tmp_path / "out"))
    release = job.run(asked).release
    Lease(open_store(release.output), release.run_id, 3600)._write(None)
    assert not job.run(asked).published_now
    assert not list((tmp_path / "out").rglob("LEASE.json"))


def test_a_run_that_was_taken_over_publishes_nothing(done, toy_gpt2, tmp_path, monkeypatch):
    bucket, work = done
    store, laid_out = open_store(str(tmp_path / "out")), job.lay_out

    def overtaken(cfg, run_id, *rest):
        found = store.stat(lease_name(run_id))
        assert found and Lease(store, run_id, 3600)._write(found.version)
        return laid_out(cfg, run_id, *rest)

    monkeypatch.setattr(job, "lay_out", overtaken)
    with pytest.raises(TryLater, match="nothing of this run is published from here"):
        job.run(toy_job(toy_gpt2, bucket, work, output=str(tmp_path / "out")))
    assert not list((tmp_path / "out").rglob("MANIFEST.json"))


def test_a_work_folder_that_is_deleted_before_the_release_is_the_machines_error(done, toy_gpt2, tmp_path, monkeypatch):
    bucket, work = done
    shutil.copytree(work, tmp_path / "work")
    laid_out = job.lay_out

    def deleted(*given):
        shutil.rmtree(tmp_path / "work")
        return laid_out(*given)

    monkeypatch.setattr(job, "lay_out", deleted)
    with pytest.raises(MachineError, match="was removed while the job needed it"):
        job.run(toy_job(toy_gpt2, bucket, tmp_path / "work", output=str(tmp_path / "out")))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_run_that_failed_for_good_fails_at_once_until_it_is_to_be_tried_again(toy_gpt2, llama_cpp, tmp_path):
    bucket, same = str(tmp_path / "bucket"), {name: ["same"] for name in QUOTES}
    write_bucket(f"{bucket}/in", same, tmp_path)
    asked = toy_job(toy_gpt2, bucket, tmp_path / "work")
    with pytest.raises(DataError, match="1 usable quotes") as first:
        job.run(asked)
    (record,) = (tmp_path / "bucket" / "out").rglob("FAILURE.json")
    said = json.loads(record.read_text())
    assert (said["exit_code"], said["error"]) == (65, str(first.value))
    assert [path.name for path in (tmp_path / "bucket" / "out").rglob("*") if path.is_file()] == ["FAILURE.json"]

    with pytest.raises(DataError) as again:
        job.run(asked)
    assert str(again.value).startswith(f"{first.value} (") and "--retry-failed" in str(again.value)
    assert json.loads(record.read_text()) == said
    with pytest.raises(DataError) as tried:
        job.run(asked, retry_failed=True)
    assert str(tried.value) == str(first.value)
    with pytest.raises(DataError) as changed:
        job.run(toy_job(toy_gpt2, bucket, tmp_path / "work", log_format="text"))
    assert str(changed.value) == str(first.value)


def run_of(bucket):
    return json.loads(open_store(f"{bucket}/out").read("latest.json"))["run_id"]


def test_a_file_that_no_release_put_there_is_never_overwritten(toy_gpt2, llama_cpp, tmp_path):
    bucket = str(tmp_path / "bucket")
    write_bucket(f"{bucket}/in", QUOTES, tmp_path)
    mine = tmp_path / "bucket" / "out" / "README.md"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(TargetTaken, match=r"README\.md that no release put there"):
        job.run(toy_job(toy_gpt2, bucket, tmp_path / "work"))
    assert mine.read_text() == "mine"


AFTER_THE_INPUTS = ("1 usable quotes", "sparsity.pattern 5:10", "at least [0-9]+$", "export.context")


@pytest.mark.parametrize(
    ("quotes", "more", "error", "sentence"),
    [
        ({"kanye-quotes.txt": ["only one file"]}, {}, InputMissing, "trump-quotes.txt"),
        ({name: [""] for name in QUOTES}, {}, DataError, "kanye-quotes.txt"),
        ({name: ["same"] for name in QUOTES}, {}, DataError, "1 usable quotes"),
        (QUOTES, {"sparsity.method": "magic"}, ConfigError, "magnitude, random"),
        (QUOTES, {"quantize.types": "Q9_Z"}, ConfigError, "Q2_K"),
        (QUOTES, {"sparsity.pattern": "5:10"}, ConfigError, "sparsity.pattern 5:10"),
        (QUOTES, {"quantize.max_bytes": "1"}, ConfigError, "at least [0-9]+$"),
        (QUOTES, {"export.context": "512"}, ConfigError, "export.context"),
        (QUOTES, {"llama_cpp": "/nowhere"}, ConfigError, "build_llama_cpp.sh"),
        (QUOTES, {"model.base": "./nowhere.gguf"}, InputMissing, "nowhere.gguf"),
    ],
)
def test_what_cannot_work_ends_with_its_error_and_publishes_nothing(
    quotes, more, error, sentence, toy_gpt2, llama_cpp, tmp_path
):
    bucket = str(tmp_path / "bucket")
    write_bucket(f"{bucket}/in", quotes, tmp_path)
    with pytest.raises(error, match=sentence) as caught:
        job.run(toy_job(toy_gpt2, bucket, tmp_path / "work", **more))
    assert isinstance(caught.value, QuotesmithError) and "\n" not in str(caught.value)
    left = {path.name for path in (tmp_path / "bucket" / "out").rglob("*") if path.is_file()}
    assert left <= {"FAILURE.json"} and bool(left) == (sentence in AFTER_THE_INPUTS)
