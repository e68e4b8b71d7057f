import json
from types import SimpleNamespace

import pytest

from pipeline.config import GateConfig
from pipeline.errors import CheckFailed, DataError, TargetTaken
from pipeline.metrics import GateResult
from pipeline.publish import publish, verify
from pipeline.rejection import publish_judged, refuse_rejected

NAMES = ["voice-Q2_K.gguf", "metrics.json"]
GATES = GateConfig(ppl_ratio=1.25)


def judged(found):
    return [GateResult(gate="ppl_ratio", file=NAMES[0], found=found, limit=1.25, passed=found <= 1.25)]


def made(folder, gates, weights=b"weights"):
    folder.mkdir(exist_ok=True)
    (folder / NAMES[0]).write_bytes(weights)
    (folder / NAMES[1]).write_text(json.dumps({"gates": gates}))
    return {name: folder / name for name in NAMES}


def publish_as(output, found, tmp_path, run_id):
    gates = judged(found)
    files = made(tmp_path / run_id, [gate.model_dump(mode="json") for gate in gates])
    return publish_judged(str(output), SimpleNamespace(gates=gates), run_id=run_id, name="voice", files=files)


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_release_that_passes_lies_where_releases_lie(tmp_path):
    out = tmp_path / "out"
    assert publish_as(out, 1.2, tmp_path, "run1").output == str(out)
    assert (out / NAMES[0]).is_file() and not (out / "rejected").exists()


def test_a_rejected_release_leaves_the_latest_one_as_it_was_and_stands_beside_it(tmp_path):
    out = tmp_path / "out"
    publish_as(out, 1.2, tmp_path, "run1")
    before = files_in(out)
    with pytest.raises(CheckFailed, match=r"rejected by gate\.ppl_ratio.* 1\.5 times.* at most 1\.25") as caught:
        publish_as(out, 1.5, tmp_path, "run2")
    assert f"lie in {out}/rejected as run run2" in str(caught.value)
    after = files_in(out)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("rejected/") for name in after.keys() - before.keys())
    assert len(verify(str(out / "rejected"))) == 2 * len(NAMES) and verify(str(out / "rejected" / "runs" / "run2"))


def test_a_rejected_run_is_refused_again_in_the_same_words_and_made_whole(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckFailed) as first:
        publish_as(out, 1.5, tmp_path, "run1")
    (out / "rejected" / "latest.json").unlink()  # as a crash after the manifest leaves it
    (out / "rejected" / NAMES[0]).unlink()
    with pytest.raises(CheckFailed) as again:
        refuse_rejected(str(out), GATES, "run1", NAMES)
    assert str(again.value) == str(first.value)
    assert verify(str(out / "rejected"))


def test_another_run_or_one_without_gates_is_not_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckFailed):
        publish_as(out, 1.5, tmp_path, "run1")
    refuse_rejected(str(out), GATES, "run2", NAMES)
    refuse_rejected(str(out), GateConfig(), "run1", NAMES)


def test_a_file_under_rejected_that_no_release_put_there_is_refused_before_the_work(tmp_path):
    mine = tmp_path / "out" / "rejected" / NAMES[0]
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(TargetTaken, match="no release put there"):
        refuse_rejected(str(tmp_path / "out"), GATES, "run1", NAMES)
    refuse_rejected(str(tmp_path / "out"), GateConfig(), "run1", NAMES)


@pytest.mark.parametrize("gates", [None, [{"gate": "ppl_ratio"}]])
def test_a_standing_release_that_does_not_say_how_it_was_judged_is_bad_data(gates, tmp_path):
    out = tmp_path / "out"
    publish(f"{out}/rejected", run_id="run1", name="voice", files=made(tmp_path / "made", gates))
    with pytest.raises(DataError, match="how it was judged"):
        refuse_rejected(str(out), GATES, "run1", NAMES)
