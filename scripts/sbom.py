#!/usr/bin/env python3
"""The image's bill of materials, as CycloneDX 1.6 JSON: scripts/sbom.py quotesmith:0.1.0-cpu >sbom.json

An image is asked what is in it: Debian's packages, and Python's with their licences, which must be those of its lock.
Without one, `--variant` lists what would be installed, from the lock alone.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from image_sizes import pins
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHON = "/opt/venv/bin/python"
# Run inside the image, which need not know of CycloneDX. Older packages name their licence in a line or a classifier,
# some have its whole text where the line should be.
LIST = """
import importlib.metadata as m, json
def licence(of):
    line = of.get("License-Expression") or of.get("License") or ""
    if line and len(line) < 60 and line != "UNKNOWN":
        return line
    return ", ".join(c.split(" :: ")[-1] for c in of.get_all("Classifier", ()) if c.startswith("License :: "))
print(json.dumps([(d.name, d.version, licence(d.metadata)) for d in m.distributions()]))
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def inside(image: str, *command: str) -> str:
    """What a program of the image prints."""
    engine = next((each for each in ("podman", "docker") if shutil.which(each)), None)
    if engine is None:
        raise click.ClickException("neither podman nor docker is here to look into the image; install one")
    options = ["--rm", "--network", "none", "--entrypoint", command[0]]
    done = subprocess.run([engine, "run", *options, image, *command[1:]], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{image} cannot be looked into: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def from_pypi(name: str, version: str, hashes: set[str], licence: str = "") -> Component:
    """With the hashes of the files that the lock lets pip install."""
    files = [HashType(alg=HashAlgorithm.SHA_256, content=each) for each in sorted(hashes)]
    page = ExternalReference(
        type=ExternalReferenceType.DISTRIBUTION, url=XsUri(f"https://pypi.org/project/{name}/"), hashes=files
    )
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=f"pypi:{name}",
        purl=PackageURL("pypi", name=name, version=version),
        licenses=[LicenseFactory().make_from_string(licence)] if licence else [],
        external_references=[page],
    )


def llama_cpp() -> Component:
    """Its source, as scripts/build_llama_cpp.sh pins it."""
    text = (ROOT / "scripts/build_llama_cpp.sh").read_text(encoding="utf-8")
    found = re.search(r"^package=(\S+) version=(\S+).*\nsha256=([0-9a-f]{64})$", text, re.M)
    if not found:
        raise click.ClickException("scripts/build_llama_cpp.sh no longer says package, version and sha256 on two lines")
    package, version, sha256 = found.groups()
    source = from_pypi(package, version, {sha256}, "MIT")
    source.name, source.purl = (
        "llama.cpp",
        PackageURL("pypi", name=package, version=version, subpath="vendor/llama.cpp"),
    )
    source.description = f"compiled from vendor/llama.cpp in the source of {package} {version}"
    return source


def debian_packages(status: str) -> Iterator[Component]:
    """From dpkg's status file."""
    for paragraph in status.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if re.match(r"[\w-]+: ", line))
        if fields.get("Status", "").endswith(" installed"):
            name, version, arch = fields["Package"], fields["Version"], fields["Architecture"]
            yield Component(
                type=ComponentType.LIBRARY,
                name=name,
                version=version,
                bom_ref=f"deb:{name}:{arch}",
                purl=PackageURL("deb", "debian", name, version, {"arch": arch}),
            )


def python_packages(variant: str, listed: list[tuple[str, str, str]] | None) -> Iterator[Component]:
    """Those of the lock, with the licences of those `listed` in an image; both must be the same."""
    locked = {normal(name): value for name, value in pins(variant).items()}
    licences = {normal(name): (version, licence) for name, version, licence in listed or ()}
    if listed is not None:
        ours, theirs = ({(n, v[0]) for n, v in each.items()} for each in (locked, licences))
        if other := sorted(ours ^ theirs):
            pairs = ", ".join(f"{name} {version}" for name, version in other)
            raise click.ClickException(
                f"the image and scripts/image/{variant}.lock differ in {pairs}; build the image again from this commit"
            )
    for name, (version, hashes) in sorted(locked.items()):
        yield from_pypi(name, version, hashes, licences.get(name, ("", ""))[1])


def bill(variant: str, image: str | None) -> Bom:
    bom = Bom()
    bom.metadata.component = Component(
        type=ComponentType.CONTAINER,
        name=PROJECT["name"],
        version=PROJECT["version"],
        bom_ref="image",
        licenses=[LicenseFactory().make_from_string(PROJECT["license"])],
    )
    listed = json.loads(inside(image, PYTHON, "-c", LIST)) if image else None
    parts = [*python_packages(variant, listed), llama_cpp()]
    if image:
        parts += debian_packages(inside(image, "cat", "/var/lib/dpkg/status"))
    bom.components.update(parts)
    bom.register_dependency(bom.metadata.component, parts)
    return bom


@click.command()
@click.argument("image", required=False)
@click.option("--variant", type=click.Choice(["cuda", "cpu"]), help="[default: what the image's name ends in, or cuda]")
def main(image: str | None, variant: str | None) -> None:
    """Print the bill of materials of IMAGE."""
    chosen = variant or ("cpu" if image and image.endswith("-cpu") else "cuda")
    click.echo(JsonV1Dot6(bill(chosen, image)).output_as_string(indent=2))


if __name__ == "__main__":
    main()
