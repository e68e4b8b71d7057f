import pytest
from torch.utils.tensorboard import SummaryWriter

from pipeline import curves
from pipeline.artifacts import Checkpoint
from pipeline.storage import open_store


@pytest.fixture
def tuned(tmp_path):
    """What fine-tuning leaves in its folder, as far as this goes."""
    with SummaryWriter(str(tmp_path / "stage" / curves.FOLDER)) as writer:
        writer.add_scalar("train/loss", 3.5, 1)
    return Checkpoint(tmp_path / "stage/model", "hash")


@pytest.mark.parametrize("place", ["folder", "gs"])
def test_what_training_wrote_for_tensorboard_is_where_the_platform_looks(place, tuned, tmp_path, request):
    uri = f"{request.getfixturevalue('gcs_bucket_uri')}/logs" if place == "gs" else str(tmp_path / "logs")
    curves.show(tuned, uri)
    curves.show(tuned, uri)  # a start that goes on
    ((name, size),) = open_store(uri).list("")
    (written,) = (tmp_path / "stage" / curves.FOLDER).iterdir()
    assert name == f"finetune/{written.name}" and size == written.stat().st_size > 0


def test_curves_that_cannot_be_shown_cost_a_warning_only(tuned, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    curves.show(tuned, str(tmp_path / "file/logs"))
    assert "TensorBoard's files are not copied to" in caplog.text


def test_where_nobody_looks_nothing_is_copied(tuned, tmp_path):
    curves.show(tuned, "")
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]
