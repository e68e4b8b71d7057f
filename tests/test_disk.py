import errno
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from pipeline.disk import as_machine_error, errors_translated
from pipeline.errors import DataError, MachineError

FULL = Path("/dev/full")  # every write to it finds the disk full
needs_full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_or_failing_disk_is_the_machines_error(number, tmp_path):
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
