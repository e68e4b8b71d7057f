import pytest

from pipeline import job, report
from pipeline.config import TrainConfig
from pipeline.finetune import optimizer_steps
from pipeline.plan import plan
from tests.test_job import QUOTES, toy_job, write_bucket


@pytest.mark.parametrize(
    ("examples", "settings", "steps"),
    [
        (160, {"epochs": 1}, 10),
        (161, {"epochs": 1}, 11),
        (160, {"epochs": 2}, 20),
        (160, {"epochs": 0.5}, 5),
        (160, {"max_steps": 3}, 3),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(examples, settings, steps):
    assert optimizer_steps(examples, TrainConfig(**settings)) == steps


def test_the_plan_of_a_job_is_what_the_job_then_does(small_model, tmp_path):
    bucket = str(tmp_path / "bucket")
    write_bucket(f"{bucket}/in", QUOTES, tmp_path)
    more = small_model | {"train.max_steps": "0", "train.epochs": "1"}
    asked = toy_job(None, bucket, tmp_path / "work", **more)
    planned = plan(asked)
    assert not (tmp_path / "work" / "finetune").exists()
    text = report.of_plan(planned)
    assert "kanye-quotes.txt" in text and f"{planned.steps} optimizer steps" in text

    metrics = job.run(asked).metrics
    facts = {stage["name"]: stage["facts"] for stage in metrics["stages"]}
    assert facts["finetune"]["steps"] == planned.steps
    size = metrics["ggufs"][0]["size_bytes"]
    assert planned.outputs["gpt2-ye-trump-Q2_K.gguf"].size_bytes == size
    used = sum(path.stat().st_size for path in (tmp_path / "work").rglob("*") if path.is_file())
    assert planned.disk_bytes == pytest.approx(used, rel=0.01)
