import json
import shutil
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.model_folder import LARGEST_CONFIG, check_folder


@pytest.fixture
def folder(toy_gpt2, tmp_path):
    return Path(shutil.copytree(toy_gpt2, tmp_path / "model"))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_folder_passes(folder, wide_llama):
    check_folder(folder)
    check_folder(wide_llama)


def index(file):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"transformer.wte.weight": file}})
    )


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda folder: edit(folder / "config.json", n_layer=10**9), "1000000000 layers, but the files only"),
        (lambda folder: edit(folder / "config.json", n_layer=0), "0 layers, but the files only"),
        (lambda folder: edit(folder / "config.json", n_positions=10**12), "describes a model of .* weights, but"),
        (lambda folder: edit(folder / "config.json", n_inner=10**12), "describes a model of .* weights, but"),
        (lambda folder: (folder / "config.json").write_text(" " * LARGEST_CONFIG + "{}"), r"config\.json has"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "names another model to load"),
        (index("../other/model.safetensors"), r"names \.\./other/model\.safetensors, which is no"),
        (index("/etc/passwd"), "names /etc/passwd"),
        (index("pytorch_model.bin"), r"names pytorch_model\.bin"),
        (index(5), "names 5"),
        (lambda folder: (folder / "model-00001-of-00001.safetensors").write_bytes(b"\3"), "cut off"),
    ],
)
def test_a_folder_that_would_cost_more_than_its_files_or_leads_elsewhere_is_refused(spoil, found, folder):
    spoil(folder)
    with pytest.raises(DataError, match=found):
        check_folder(folder)


def test_an_index_that_names_its_own_files_passes(folder):
    index("model.safetensors")(folder)
    check_folder(folder)
