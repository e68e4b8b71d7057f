import pytest

from pipeline.config import JobConfig
from pipeline.errors import ConfigError
from pipeline.settings import all_settings, as_table, resolve, value_of


def test_the_defaults_are_the_users_recipe():
    train, job = JobConfig().train, JobConfig()
    assert (train.epochs, train.batch_size, train.accumulation) == (2, 4, 4)
    assert (train.learning_rate, train.weight_decay) == (3e-4, 0.01)
    assert (job.tokens.max_length, job.sparsity.ratio, job.quantize.types) == (128, 0.5, ("Q2_K",))
    assert job.model.base == "openai-community/gpt2"


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("train:\n  epochs: 3\n  batch_size: 3\n  learning_rate: 0.003\n")
    env = {"QUOTESMITH_TRAIN_EPOCHS": "4", "QUOTESMITH_TRAIN_BATCH_SIZE": "4", "HOME": "/root"}
    resolved = resolve({"train.epochs": "5"}, env, str(file))
    assert (resolved.config.train.epochs, resolved.origins["train.epochs"]) == (5, "flag --train.epochs")
    assert resolved.config.train.batch_size == 4
    assert resolved.origins["train.batch_size"] == "environment QUOTESMITH_TRAIN_BATCH_SIZE"
    assert (resolved.config.train.learning_rate, resolved.origins["train.learning_rate"]) == (0.003, f"file {file}")
    assert resolved.origins["train.weight_decay"] == "default"


def test_the_config_file_can_be_named_by_the_environment(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("train.epochs: 7\n")
    assert resolve({}, {"QUOTESMITH_CONFIG": str(file)}).config.train.epochs == 7


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["Q2_K", "Q4_0"], ("Q2_K", "Q4_0")),
        (["Q2_K,Q4_0"], ("Q2_K", "Q4_0")),
        ('["Q2_K", "Q4_0"]', ("Q2_K", "Q4_0")),
        (['["Q2_K"]'], ("Q2_K",)),
    ],
)
def test_a_list_is_repeated_comma_separated_or_json(given, expected):
    assert resolve({"quantize.types": given}, {}).config.quantize.types == expected


def test_a_prompt_with_a_comma_survives_as_json():
    assert resolve({"evaluate.prompts": '["Well, I"]'}, {}).config.evaluate.prompts == ("Well, I",)


@pytest.mark.parametrize(
    ("env", "flags", "file", "sentence"),
    [
        ({"QUOTESMITH_TRAIN_EPOCH": "1"}, {}, None, "did you mean QUOTESMITH_TRAIN_EPOCHS"),
        ({}, {}, "trian:\n  epochs: 1\n", "unknown setting in"),
        ({}, {}, "train:\n  epoch: 1\n", "did you mean train.epochs"),
        ({}, {}, "- 1\n", "needed a mapping"),
        ({}, {}, "a: [", "not valid YAML"),
        ({}, {}, "data: {files: &a [x]}\nname: *a", "has aliases"),
        ({}, {}, "#" * 1_100_000, "needed a YAML file of at most"),
        ({}, {"train.epochs": "-1"}, None, r"train.epochs is '-1' \(flag --train.epochs\)"),
        ({}, {"train.epochs": "nan"}, None, "train.epochs is 'nan'"),
        ({}, {"sparsity.ratio": "1.5"}, None, "sparsity.ratio is '1.5'"),
        ({}, {"sparsity.pattern": "1:4"}, None, "set sparsity.ratio to 0.75"),
        ({}, {"sparsity.pattern": "4:2"}, None, "0 < n < m"),
        ({}, {"sparsity.pattern": "2:4", "sparsity.scope": "global"}, None, "scope must be matrix"),
        ({}, {"tokens.holdout": "0.5", "tokens.validation": "0.5"}, None, "leave quotes to train on"),
        ({}, {"train.select_best": "true"}, None, "tokens.validation is 0"),
        ({}, {"device": "cpu", "train.precision": "fp16"}, None, "fp16 needs a GPU"),
        ({}, {"quantize.max_bytes": "9", "quantize.types": "Q2_K,F16,Q6_K"}, None, "one mix of.* names Q2_K, Q6_K;"),
        ({}, {"export.context": "1000000"}, None, "export.context is '1000000'"),
        ({}, {"sparsity.ratio": "1"}, None, "sparsity.ratio is '1'"),
        ({}, {"sparsity.ratio": "-0.1"}, None, "sparsity.ratio is '-0.1'"),
        ({}, {"name": "../x"}, None, "name is '../x'"),
        ({}, {"quantize.types": "[1"}, None, "JSON list"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(env, flags, file, sentence, tmp_path):
    path = None
    if file is not None:
        (tmp_path / "job.yaml").write_text(file)
        path = str(tmp_path / "job.yaml")
    with pytest.raises(ConfigError, match=sentence) as error:
        resolve(flags, env, path)
    assert "\n" not in str(error.value)


def test_what_kubernetes_injects_for_a_service_of_our_name_is_no_setting():
    injected = {"QUOTESMITH_SERVICE_HOST": "10.0.0.1", "QUOTESMITH_PORT": "tcp://10.0.0.1:80"}
    injected |= {"QUOTESMITH_SERVICE_PORT_HTTP": "80", "QUOTESMITH_PORT_80_TCP_ADDR": "10.0.0.1"}
    assert resolve({}, injected).config == JobConfig()


def test_a_home_folder_is_expanded_where_no_shell_did(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(resolve({}, {"QUOTESMITH_WORK_DIR": "~/w"}).config.work_dir) == "/home/someone/w"


def test_a_rounded_ratio_of_a_pattern_is_taken_for_the_exact_one():
    config = resolve({"sparsity.pattern": "1:3", "sparsity.ratio": "0.667"}, {}).config
    assert config.sparsity.exact_ratio == pytest.approx(2 / 3)


def test_every_setting_has_a_value_an_origin_and_a_meaning():
    table = as_table(resolve({}, {}))
    assert {row["key"] for row in table} == {setting.key for setting in all_settings()}
    assert all(row["meaning"] and row["origin"] == "default" for row in table)
    assert value_of(JobConfig(), "quantize.types") == ["Q2_K"]


def test_a_broken_file_is_told_by_its_line_and_not_by_what_stands_there(tmp_path):
    (tmp_path / "job.yaml").write_text("train: {epochs: 2\nhf_thing: canary-d41d8cd98f00\n")
    with pytest.raises(ConfigError, match=r"in line 2, column \d+") as caught:
        resolve({}, {}, str(tmp_path / "job.yaml"))
    assert "canary" not in str(caught.value) and str(caught.value).isprintable()
