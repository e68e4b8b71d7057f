"""Files to a release: content-addressed objects first, the manifest last and once, then latest.json and copies
with plain names. A crash anywhere leaves either no release or a whole one, and publishing again completes it."""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import manifest
from pipeline.artifacts import Release, ReleasedFile
from pipeline.errors import DataError, InputMissing, TargetTaken, TransferError, TryLater
from pipeline.json_object import json_object
from pipeline.manifest import CREATED, manifest_name, object_name
from pipeline.progress import bar
from pipeline.storage import Store, open_store

log = logging.getLogger(__name__)

LATEST = "latest.json"
METRICS = "metrics.json"
SWAP_ATTEMPTS = 10
SKEW_SECONDS = 60.0  # between the clocks of two machines that are both right
RUN_ID = re.compile(r"\w[\w.-]{0,99}")


def always() -> None:
    """For who works alone."""


def publish(
    output: str, *, run_id: str, name: str, files: Mapping[str, Path], confirm: Callable[[], None] = always
) -> Release:
    """Release `files` (name for people to path) as run `run_id` under the output URI.

    If this run is already released with the same GGUF files, that release stands and only what is missing of
    latest.json and the plain copies is added. With other GGUF files: TargetTaken (73). `confirm` is called right before
    the manifest is written, and raises if this process may no longer do that.
    """
    store = open_store(output)
    ours = [manifest.describe(file, path) for file, path in files.items()]
    release = find_release(output, run_id)
    if release:
        log.info("publish: release %s of %s is already there", run_id, release.created)
        refuse_another_result(release, ours)
    shared = [file for file in ours if not release or file in release.files]
    for file in bar(shared, "publish"):
        put_object(store, object_name(run_id, file.sha256), files[file.name], file)
    if not release:
        created = manifest.created_at(time.time())
        confirm()
        store.put_if_absent(manifest_name(run_id), manifest.to_bytes(run_id, name, created, ours))
        release = standing_release(store, output, run_id)  # another run may have been faster
        refuse_another_result(release, ours)
    complete(release, {file.name: files[file.name] for file in ours if file in release.files})
    size = sum(file.size_bytes for file in release.files)
    log.info("publish: %d files, %.1f MB, at %s", len(release.files), size / 1e6, release.uri)
    return release


def refuse_another_result(release: Release, ours: Sequence[ReleasedFile]) -> None:
    if release.result_digest != manifest.result_digest(ours):
        raise TargetTaken(
            f"{release.uri} already holds a different result for the same run, made {release.created}; "
            "choose another output or remove that run"
        )


def find_release(output: str, run_id: str) -> Release | None:
    """The release of this run, if its manifest stands. Writes nothing; `complete` repairs its surroundings."""
    store = open_store(output)
    if store.stat(manifest_name(run_id)) is None:
        return None
    return standing_release(store, output, run_id)


def is_latest(release: Release) -> bool:
    """Whether the plainly named files in the output are this release's."""
    pointer = latest(open_store(release.output))
    return pointer is not None and pointer["run_id"] == release.run_id


def refuse_foreign_files(output: str, names: Sequence[str]) -> None:
    """Raises `TargetTaken` when a file that no release put there would be overwritten by a plain copy, and ConfigError
    where a folder has the name of one, or of latest.json."""
    store = open_store(output)
    are_ours = latest(store) is not None
    for name in names:
        if store.stat(name) is not None and not are_ours:
            raise TargetTaken(
                f"{output} already holds a {name} that no release put there, and publishing would overwrite it; "
                "choose an empty output"
            )


def complete(release: Release, local: Mapping[str, Path] | None = None) -> None:
    """Point latest.json at the release unless a newer one has it, and add plain copies of the one that it names where
    they lack or differ.

    Of two jobs that copy at once, the one that is done last looks last, and finds what the other has moved. Copies come
    from `local` files where given, else from a release's own objects.
    """
    store = open_store(release.output)
    if not point_latest(store, release):
        log.info("publish: latest.json names a newer release and stays as it is")
    for _ in range(SWAP_ATTEMPTS):
        newest = pointed_at(store, release)
        copy_plainly(store, newest, local if newest == release else None)
        if pointed_at(store, release) == newest:
            return
    raise TryLater(f"{store.uri}/{LATEST} keeps being moved by other runs; run again to complete the release")


def pointed_at(store: Store, ours: Release) -> Release:
    """The release that latest.json names; `ours` if that names none, or one that somebody removed."""
    pointer = latest(store)
    if pointer is None or pointer["run_id"] == ours.run_id or store.stat(manifest_name(pointer["run_id"])) is None:
        return ours
    return standing_release(store, ours.output, pointer["run_id"])


def copy_plainly(store: Store, release: Release, local: Mapping[str, Path] | None) -> None:
    for file in release.files:
        if has(store, file.name, file):
            continue
        if local and file.name in local:
            store.put(file.name, local[file.name])
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "object"
            store.get(object_name(release.run_id, file.sha256), path)
            store.put(file.name, path)


def read_metrics(release: Release) -> dict[str, Any]:
    """The metrics.json of a release; DataError if it has none or a damaged one."""
    for file in release.files:
        if file.name == METRICS:
            data = open_store(release.output).read(object_name(release.run_id, file.sha256))
            return json_object(data, f"{METRICS} of {release.uri}", DataError)
    raise DataError(f"{release.uri} has no {METRICS}; it was not published by a whole job")


def verify(uri: str) -> list[str]:
    """The names of the objects that were read back and match the manifest in size, CRC-32C and SHA-256.

    `uri` is an output folder (its latest release and the plain copies are checked), runs/<run_id> in it, or a
    MANIFEST.json. DataError (65) names what is damaged or gone, InputMissing (66) says that no release is there.
    """
    output, run_id = split_run(uri)
    store = open_store(output)
    pointer = None if run_id else latest(store)
    if not run_id and pointer is None:
        raise InputMissing(f"{uri} holds no {LATEST}, so nothing has been published there")
    run_id = run_id or (pointer["run_id"] if pointer else "")
    if store.stat(manifest_name(run_id)) is None:
        raise InputMissing(f"{output}/{manifest_name(run_id)} does not exist, so that run is not published")
    release = standing_release(store, output, run_id)
    if pointer and pointer["manifest_sha256"] != release.manifest_sha256:
        raise DataError(f"{output}/{LATEST} names another manifest than {release.uri} has; one was altered")
    names = {object_name(run_id, file.sha256): file for file in release.files}
    plain = {file.name: file for file in release.files} if pointer else {}
    for name, file in (names | plain).items():
        check(store, name, file)
    return [*names, *plain]


def put_object(store: Store, name: str, path: Path, file: ReleasedFile) -> None:
    """Written unless there, then looked at: a damaged object of an earlier run is replaced."""
    if has(store, name, file):
        return
    store.put_if_absent(name, path)
    if not has(store, name, file):
        store.put(name, path)
    if not has(store, name, file):
        raise TransferError(f"{store.uri}/{name} is not stored as it was sent; try again")


def has(store: Store, name: str, file: ReleasedFile) -> bool:
    found = store.stat(name)
    if found is None:
        return False
    if found.crc32c is None:
        return replace(read_back(store, name), name=file.name) == file
    return (found.size, found.crc32c) == (file.size_bytes, file.crc32c)


def read_back(store: Store, name: str) -> ReleasedFile:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "object"
        store.get(name, path)
        return manifest.describe(name, path)


def standing_release(store: Store, output: str, run_id: str) -> Release:
    return manifest.from_bytes(store.read(manifest_name(run_id)), output, run_id)


def point_latest(store: Store, release: Release) -> bool:
    """Move latest.json to the release by compare-and-swap; False if it names a newer one."""
    content = {
        "schema_version": manifest.SCHEMA_VERSION,
        "run_id": release.run_id,
        "created": release.created,
        "manifest": manifest_name(release.run_id),
        "manifest_sha256": release.manifest_sha256,
    }
    for _ in range(SWAP_ATTEMPTS):
        found = store.stat(LATEST)
        current = latest(store) if found else None
        if current == content:
            return True
        if current and is_newer(current, release):
            return False
        if store.compare_and_swap(LATEST, manifest.as_json(content), found.version if found else None):
            return True
    raise TryLater(f"{store.uri}/{LATEST} keeps being moved by other runs; run again to complete the release")


def is_newer(current: Mapping[str, Any], release: Release) -> bool:
    """Whether latest.json's release was made after `release`; False where it says no time, or one that is yet to come.

    Else a publisher whose clock is ahead would keep latest.json from all others for as long.
    """
    created = current["created"]
    if CREATED.fullmatch(created) and created <= manifest.created_at(time.time() + SKEW_SECONDS):
        return bool(created > release.created)
    log.warning(
        "publish: latest.json says that run %s was made at %r, which by this machine's clock has not been yet; it is "
        "not taken for newer",
        current["run_id"],
        created[: len(release.created)],
    )
    return False


def latest(store: Store) -> dict[str, Any] | None:
    if store.stat(LATEST) is None:
        return None
    content = json_object(store.read(LATEST), f"{store.uri}/{LATEST}", DataError)
    known = all(isinstance(content.get(key), str) for key in ("run_id", "created", "manifest_sha256"))
    if not known or not RUN_ID.fullmatch(content["run_id"]):
        raise DataError(f"{store.uri}/{LATEST} is not a pointer of this program; move it away")
    return content


def split_run(uri: str) -> tuple[str, str]:
    """(output, run_id); run_id is "" for the output itself."""
    parts = uri.rstrip("/").removesuffix("/MANIFEST.json").split("/")
    if len(parts) > 1 and parts[-2] == "runs":
        return "/".join(parts[:-2]) or ("/" if uri.startswith("/") else "."), parts[-1]
    return "/".join(parts), ""


def check(store: Store, name: str, file: ReleasedFile) -> None:
    """DataError unless the stored bytes are the file's."""
    where = f"{store.uri}/{name}" + ("" if name == file.name else f" ({file.name})")
    if store.stat(name) is None:
        raise DataError(f"{where} is gone, although the manifest lists it; publish again")
    found = read_back(store, name)
    if replace(found, name=file.name) != file:
        raise DataError(
            f"{where} does not match the manifest: found {found.size_bytes} bytes with SHA-256 "
            f"{found.sha256[:12]}…, needed {file.size_bytes} bytes with {file.sha256[:12]}…; publish again"
        )
