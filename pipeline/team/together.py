"""What training processes ask of each other. Alone, each asks itself.

All of it goes through the CPUs (gloo), where it makes no GPU wait.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# A process waits that long for the others, which may be saving a checkpoint. That one is lost is noticed elsewhere
# (`meeting.py`), and sooner.
PATIENCE = timedelta(minutes=60)
CHUNK = 1 << 26  # bytes

stop_asked = threading.Event()  # of this process; all stop together, once any of them knows

Value = TypeVar("Value")


def join(device: str) -> None:
    """Become one of the processes that torchrun has started; accelerate takes the group as it is."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)


def part() -> None:
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """Over all processes, in place; on the CPU."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean(value: float) -> float:
    """Over all processes."""
    return float(summed(torch.tensor(value, dtype=torch.float64))) / size()


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Whether each is true in any process."""
    if not dist.is_initialized():
        return flags
    return tuple(bool(count) for count in summed(torch.tensor(flags, dtype=torch.int32)).tolist())


def collected(data: bytes) -> list[bytes]:
    """Every process's, by rank, in the first; elsewhere nothing."""
    if not dist.is_initialized():
        return [data]
    found: list[bytes] = [b""] * size() if rank() == 0 else []
    dist.gather_object(data, found or None)
    return found


def told(value: Value) -> Value:
    """The first process's value."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def brought(folder: Path | None, to: Path) -> Path | None:
    """The first process's `folder`: itself on the first machine, a copy of it in the folder `to` on the others.

    None where the first process has none. To be called by all; what the others say does not count.
    """
    if not dist.is_initialized():
        return folder
    source: Path | None = told(folder)
    if source is None or os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"]:
        return source
    first, copy = int(os.environ["GROUP_RANK"]) == 0, to / source.name
    writes = not first and int(os.environ["LOCAL_RANK"]) == 0
    for name, count in told([(str(path.relative_to(source)), size) for path, size in files(source)]):
        pass_on(source / name if rank() == 0 else None, count, copy / name if writes else None)
    dist.barrier()
    return source if first else copy


def files(folder: Path) -> list[tuple[Path, int]]:
    return [(path, path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()]


def pass_on(source: Path | None, size_bytes: int, to: Path | None) -> None:
    """One file, in pieces: `source` is read by the first process, `to` written by one on each other machine."""
    if to:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(b"")
    for start in range(0, size_bytes, CHUNK):
        count = min(CHUNK, size_bytes - start)
        piece = torch.empty(count, dtype=torch.uint8)
        if source:
            with source.open("rb") as file:
                file.seek(start)
                piece = torch.frombuffer(bytearray(file.read(count)), dtype=torch.uint8)
        dist.broadcast(piece, 0)
        if to:
            with to.open("ab") as file:
                file.write(piece.numpy().tobytes())
