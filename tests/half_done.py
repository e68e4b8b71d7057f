"""What must be true of a bucket and a work folder whatever happened to the job that works there."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from pipeline import publish, sealed
from pipeline.manifest import object_name
from pipeline.storage.local import TEMPORARY
from tests.spoilt_jobs import CANARY, Ended, Place, without_chance

OBJECT = without_chance(f"bucket/out/{object_name('0' * 16, '0' * 64)}")


def assert_nothing_is_half_done(place: Place, ended: Ended) -> None:
    """Whatever happened, and whether or not anybody could clean up."""
    assert not ended.left, f"processes are left: {ended.left}"
    assert "Traceback" not in ended.said, ended.said
    assert CANARY not in ended.said
    for path in place.files():
        assert CANARY.encode() not in path.read_bytes(), f"{path} holds a secret"
    for marker in place.folder.rglob(sealed.MARKER):
        if marker.is_symlink():  # what the converter is given
            continue
        if marker.is_relative_to(place.out):
            assert_copy_is_whole(marker)
        elif TEMPORARY not in str(marker):
            assert sealed.opened(marker.parent), f"{marker.parent} is not as its marker says"
    for path in place.out.rglob("sha256/*"):
        assert path.name.startswith(TEMPORARY) or path.name == sha256(path), f"{path} is not what its name says"
    assert_release_is_whole_or_absent(place.out)


def assert_copy_is_whole(marker: Path) -> None:
    for file in sealed.parsed(marker.read_bytes()).files.values():
        assert (marker.parent / "sha256" / file.sha256).stat().st_size == file.size


def assert_release_is_whole_or_absent(out: Path) -> None:
    plain = {path.name for path in out.glob("*") if path.is_file() and not path.name.startswith((TEMPORARY, ".probe"))}
    assert not list(out.rglob("FAILURE.json")), "a fault that passes is recorded as one for good"
    manifests = list(out.rglob("MANIFEST.json"))
    if not manifests:
        assert not plain, f"{plain} before the manifest"
        return
    (manifest,) = manifests
    assert publish.verify(str(manifest))
    listed = {entry["name"]: entry["sha256"] for entry in json.loads(manifest.read_bytes())["objects"]}
    for name in plain - {publish.LATEST}:
        assert sha256(out / name) == listed[name], f"{name} is not the release's"
    if publish.LATEST in plain:
        content = json.loads((out / publish.LATEST).read_bytes())
        assert content["manifest_sha256"] == sha256(manifest)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_over(place: Place) -> list[str]:
    """What only a job at work may have: locks, leases, temporary files."""
    names = re.compile(rf"{re.escape(TEMPORARY)}.*|\.probe-.*|\.tmp.*|tmp\w{{8}}|IN_USE|LEASE\.json")
    found = [path for root in (place.out, place.work) for path in root.rglob("*") if names.fullmatch(path.name)]
    return sorted(str(path.relative_to(place.folder)) for path in (*found, *place.tmp.iterdir()))


def names_in(place: Place) -> Counter[str]:
    """Every file, for comparison with another run's."""
    return Counter(without_chance(str(path.relative_to(place.folder))) for path in place.files())


def digest_in(place: Place) -> str:
    (manifest,) = place.out.rglob("MANIFEST.json")
    return str(json.loads(manifest.read_bytes())["result_digest"])
