"""A folder out of a bucket, looked through before anything in it is loaded: that every hash is right says only that it
is what somebody put there."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import DataError
from pipeline.foreign_text import printable
from pipeline.gguf_guard import check_from_outside
from pipeline.model_folder import LARGEST_TEXT, check_folder, check_size
from pipeline.safetensors_file import tensors_of

LONGEST_FINDING = 500  # characters


def check_foreign(folder: Path) -> None:
    """Raises `DataError` for a file that does not hold what it says, or that would take more memory than its size."""
    for path in sorted(folder.rglob("*")):
        if look := CHECKS.get(path.suffix):
            look(path)
    for path in sorted(folder.rglob("config.json")):
        try:
            check_folder(path.parent)
        except DataError:
            raise
        except Exception as e:  # whatever transformers trips over, these files are not ours
            raise DataError(f"{path.name} cannot be read: {printable(e, LONGEST_FINDING)}") from e


def check_torch(path: Path) -> None:
    """What torch.save writes is a zip of entries as they are; torch.load would also unpack 40 kB to 40 MB."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as e:  # zipfile has many
        raise DataError(f"{path.name} is not what torch.save writes: {printable(e, LONGEST_FINDING)}") from e
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise DataError(
            f"{path.name} is packed: {unpacked} bytes in {path.stat().st_size}; needed as torch.save writes it"
        )


CHECKS: dict[str, Callable[[Path], object]] = {
    ".safetensors": tensors_of,
    ".pt": check_torch,
    ".pth": check_torch,
    ".gguf": check_from_outside,
    ".json": lambda path: check_size(path, LARGEST_TEXT),
}
