import errno
import tempfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from pipeline.disk import as_machine_error, clear, errors_translated, number_of
from pipeline.errors import CheckFailed, DataError, MachineError, NotAllowed

refusal = pytest.mark.fault(
    "processes and whole runs", "a machine that refuses memory, files, threads or its disk", "ended with code 71"
)

FULL = Path("/dev/full")  # every write to it finds the disk full
needs_full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")


NUMBERS = ["ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE", "ENOMEM", "EAGAIN", "EMFILE", "ENFILE", "EFBIG", "ENOTCONN"]


@refusal
@pytest.mark.parametrize("number", [getattr(errno, name) for name in NUMBERS])
def test_what_the_machine_refuses_is_its_error(number, tmp_path):
    with pytest.raises(MachineError, match=str(tmp_path)) as caught, errors_translated(tmp_path):
        raise OSError(number, "what the system says")
    assert isinstance(caught.value.__cause__, OSError)


def write_tokenizer(path):
    Tokenizer(BPE()).save(str(path))


def write_torch(path):
    torch.save({"x": torch.zeros(1_000_000)}, path)


def write_little_torch(path):
    torch.save({"x": torch.zeros(1)}, path)  # fits into a buffer: the disk refuses only as the file is closed


@needs_full
@pytest.mark.parametrize(
    "write", [write_tokenizer, write_torch, write_little_torch, lambda path: path.write_bytes(b"x")]
)
def test_a_full_disk_is_known_whichever_library_met_it(write):
    with pytest.raises(MachineError), errors_translated(FULL):
        write(FULL)


def test_the_error_of_safetensors_is_read():
    from safetensors import SafetensorError

    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "is full (here)" in str(as_machine_error(full, "here"))
    failed = SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")
    assert "failed (here)" in str(as_machine_error(failed, "here"))


@pytest.mark.parametrize("error", [DataError("no text"), ValueError("os error"), FileNotFoundError(2, "no such file")])
def test_what_is_not_the_disks_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, errors_translated(Path()):
        raise error
    assert caught.value is error


@refusal
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
)
def test_what_python_has_no_number_for_is_the_machines_error_too(error):
    assert as_machine_error(error, "here")


@pytest.mark.parametrize("error", [CheckFailed("a tool failed"), DataError("no text"), FileNotFoundError(2, "none")])
def test_whatever_fails_while_a_folder_is_gone_failed_for_that(error, tmp_path):
    needed = [tmp_path, tmp_path / "gone"]
    with pytest.raises(MachineError, match=r"/gone was removed .*; run again"), errors_translated(tmp_path, needed):
        raise error


def test_whatever_is_in_a_folders_way_goes_of_a_link_only_the_link(tmp_path):
    (tmp_path / "full" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for name in ("file", "link", "nothing"):
        clear(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["full"] and (tmp_path / "full" / "inner").exists()
    clear(tmp_path / "full")
    assert not list(tmp_path.iterdir())


def test_what_cannot_go_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotAllowed, match=r"file/x is in the way and cannot be removed \(Not a directory\)"):
        clear(tmp_path / "file" / "x")


@refusal
def test_that_no_temporary_file_can_be_made_is_the_machines_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    with pytest.raises(MachineError, match="set TMPDIR"), errors_translated(tmp_path):
        tempfile.gettempdir()


def test_a_file_that_torch_cannot_open_is_told_by_what_the_system_says():
    said = "[enforce fail at inline_container.cc:747] . open file failed with strerror: {}"
    assert number_of(RuntimeError(said.format("Input/output error"))) == errno.EIO
    assert number_of(RuntimeError(said.format("No space left on device"))) == errno.ENOSPC
    assert number_of(RuntimeError(said.format("Is a directory"))) is None
