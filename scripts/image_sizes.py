#!/usr/bin/env python3
"""How large the image is, in bytes on disk: the CPU variant layer by layer as it was built, and from its lock file the
CUDA variant, which may be too much for the machine that asks.

The second downloads no wheel. The index says how long each is, and the list of what is in it stands at its end: that
is read, files of those lengths and without content are made, and scripts/image/trim.sh is let loose on them.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

IMAGES = Path(__file__).resolve().parent / "image"
INDEX = os.environ.get("INDEX_URL", "https://pypi.org/simple")
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", re.M)
WHEEL = re.compile(r"(py3|cp311|cp3\d+-abi3)\S*(any|linux\S*x86_64)\.whl$|-cp311-cp311-\S*linux\S*x86_64\.whl$")
TAIL = 1 << 20  # bytes that hold a wheel's list of files


class Remote(io.RawIOBase):
    """A file on a web server, read in parts."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.at = url, size, 0
        self.start = max(0, size - TAIL)
        self.tail = self.fetch(self.start, size)

    def fetch(self, start: int, end: int) -> bytes:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{end - 1}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 206:
                raise click.ClickException(f"{self.url} cannot be read in parts (HTTP {answer.status})")
            return bytes(answer.read())

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def read(self, count: int = -1) -> bytes:
        end = self.size if count < 0 else min(self.size, self.at + count)
        if self.at >= self.start:
            part = self.tail[self.at - self.start : end - self.start]
        else:
            part = self.fetch(self.at, end) if end > self.at else b""
        self.at += len(part)
        return part


@dataclass(frozen=True)
class Wheel:
    name: str
    url: str
    size: int


def pins(variant: str) -> dict[str, tuple[str, set[str]]]:
    """Version and hashes of each package."""
    text = (IMAGES / f"{variant}.lock").read_text(encoding="utf-8")
    return {name: (version, set(re.findall("[0-9a-f]{64}", hashes))) for name, version, hashes in PIN.findall(text)}


def wheels() -> Iterator[Wheel]:
    """The files of the CUDA variant that the CPU variant has not or has otherwise."""
    cuda, cpu = pins("cuda"), pins("cpu")
    for name, (version, hashes) in cuda.items():
        if name == "bitsandbytes" or cpu.get(name, ("", 0))[0] != version:  # the first is trimmed otherwise
            yield wheel(name, version, hashes)


def wheel(name: str, version: str, hashes: set[str]) -> Wheel:
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    request = urllib.request.Request(f"{INDEX.rstrip('/')}/{name}/", headers=accept)
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    fitting = [each for each in files if each["hashes"].get("sha256") in hashes and WHEEL.search(each["filename"])]
    if len(fitting) != 1:
        names = ", ".join(each["filename"] for each in fitting) or "none"
        raise click.ClickException(f"one wheel of {name} {version} must fit the image; {INDEX} has {names}")
    return Wheel(name, fitting[0]["url"], fitting[0]["size"])


def unpack_hollow(wheel: Wheel, packages: Path) -> None:
    """Files with the wheel's names and lengths, that take no room; torch/version.py is real, for trim.sh reads it."""
    with zipfile.ZipFile(Remote(wheel.url, wheel.size)) as archive:
        for each in archive.infolist():
            place = packages / each.filename
            if not each.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as file:
                    file.truncate(each.file_size)
            if each.filename == "torch/version.py":
                place.write_bytes(archive.read(each))


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def computed() -> dict[str, tuple[int, int, int]]:
    """Bytes of each package as a download, unpacked and trimmed."""
    found = list(wheels())
    with tempfile.TemporaryDirectory() as folder:
        every = Path(folder)
        packages = every / "lib/python3.11/site-packages"
        (every / "bin").mkdir()
        (every / "bin/python").write_text("#!/bin/sh\n")
        (every / "bin/python").chmod(0o755)
        for name in ("numpy", "sympy", "networkx"):  # which trim.sh looks into, and both variants have alike
            (packages / name).mkdir(parents=True)
        sizes: dict[str, tuple[int, int, int]] = {}
        unpacked = 0
        for each in found:
            unpack_hollow(each, packages)
            before, unpacked = unpacked, held(packages)
            sizes[each.name] = (each.size, unpacked - before, 0)  # what trim.sh takes is of them all
        subprocess.run(["bash", IMAGES / "trim.sh", every], check=True, stdout=subprocess.DEVNULL)
        trimmed = held(packages)
    return {**sizes, "all of them": (sum(each.size for each in found), unpacked, trimmed)}


def layers(image: str) -> list[tuple[str, int]]:
    """Each layer that is not empty, the base first."""
    done = subprocess.run(
        ["podman", "history", "--no-trunc", "--format", "json", image], capture_output=True, text=True
    )
    if done.returncode:
        raise click.ClickException(f"podman knows no image {image}; build it with VARIANT=cpu scripts/build_image.sh")
    return [(each["CreatedBy"], each["size"]) for each in reversed(json.loads(done.stdout)) if each["size"]]


@click.command()
@click.argument("image", required=False)
def main(image: str | None) -> None:
    """Print the layers of IMAGE, then what the CUDA variant's own packages come to. 1 MB is 10^6 bytes."""
    for made_by, size in layers(image) if image else ():
        click.echo(f"{size / 1e6:9.1f} MB  {made_by[:90]}")
    click.echo(" download   unpacked    trimmed  package of the CUDA variant")
    for name, sizes in computed().items():
        click.echo(" ".join(f"{size / 1e6:7.1f} MB" if size else " " * 10 for size in sizes) + f"  {name}")


if __name__ == "__main__":
    main()
