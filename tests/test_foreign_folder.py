import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError
from pipeline.foreign_folder import check_foreign
from pipeline.model_folder import LARGEST_TEXT
from tests.test_model_folder import edit


@pytest.fixture
def folder(toy_gpt2, gpt2_vocab, tmp_path):
    """A model with what a checkpoint and a finished stage have beside it."""
    model = Path(shutil.copytree(toy_gpt2, tmp_path / "folder" / "trainer"))
    torch.save({"state": torch.zeros(1000), "step": 3}, model / "optimizer.pt")
    torch.save({"cpu": torch.get_rng_state(), "numpy": ("MT19937", [1, 2], 0.5)}, model / "rng_state.pth")
    shutil.copy(gpt2_vocab, tmp_path / "folder" / "voice.gguf")
    return tmp_path / "folder"


def test_what_this_job_writes_passes(folder):
    check_foreign(folder)


def packed(path):
    """The same entries, compressed."""
    whole = zipfile.ZipFile(path)
    contents = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    torch.load(path, weights_only=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def grown(path):
    with path.open("r+b") as file:
        file.truncate(LARGEST_TEXT + 1)


@pytest.mark.parametrize(
    ("name", "spoil", "found"),
    [
        ("trainer/optimizer.pt", packed, r"optimizer\.pt is packed: \d+ bytes in \d+; needed as torch\.save writes it"),
        ("trainer/rng_state.pth", cut, r"rng_state\.pth is not what torch\.save writes"),
        ("trainer/model.safetensors", cut, r"model\.safetensors is cut off"),
        ("trainer/config.json", lambda path: edit(path, n_layer=10**9), "1000000000 layers, but the files only"),
        ("trainer/config.json", lambda path: path.write_text("[]"), r"config\.json cannot be read"),
        ("trainer/tokenizer.json", grown, r"tokenizer\.json has \d+ bytes; needed at most"),
        ("voice.gguf", cut, r"voice\.gguf is cut off"),
    ],
)
def test_what_does_not_hold_what_it_says_is_refused(name, spoil, found, folder):
    spoil(folder / name)
    with pytest.raises(DataError, match=found):
        check_foreign(folder)
