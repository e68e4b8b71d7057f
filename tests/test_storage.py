"""One contract for every scheme, then what is special about each."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.api_core import exceptions as api

from pipeline import errors
from pipeline.storage import Store, crc32c_of, gs, local, open_store


@pytest.fixture(params=["local", "gs"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "bucket")
    return f"{request.getfixturevalue('gcs_bucket_uri')}/some/prefix"


@pytest.fixture
def store(uri: str) -> Store:
    return open_store(uri)


@pytest.fixture
def locked_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder this process may not write to: root, who may write everywhere, becomes nobody meanwhile."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    if user == 0:
        os.seteuid(user)


def test_an_object_comes_back_as_it_was_put(store: Store, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "new folder" / "back"
    source.write_bytes(os.urandom(9_000_000))  # over 8 MB: a resumable upload on gs://
    store.put("a/b.bin", source)
    store.get("a/b.bin", back)
    assert back.read_bytes() == source.read_bytes()
    assert [path.name for path in back.parent.iterdir()] == ["back"]
    found = store.stat("a/b.bin")
    assert found and found.size == 9_000_000 and found.crc32c == crc32c_of(source)


def test_a_put_overwrites_and_changes_the_version(store: Store, tmp_path: Path) -> None:
    versions = set()
    for content in (b"one", b"two", b"three"):
        (tmp_path / "file").write_bytes(content)
        store.put("x", tmp_path / "file")
        found = store.stat("x")
        assert found and store.read("x") == content
        versions.add(found.version)
    assert len(versions) == 3


def test_an_absent_object_has_no_stat_and_cannot_be_read(store: Store, tmp_path: Path) -> None:
    store.put_if_absent("folder/there", b"x")
    assert store.stat("absent") is None
    assert store.stat("folder") is None
    with pytest.raises(errors.InputMissing, match="absent"):
        store.read("absent")
    with pytest.raises(errors.InputMissing, match="absent"):
        store.get("absent", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_put_if_absent_leaves_what_stands(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from a file")
    assert store.put_if_absent("x", tmp_path / "file")
    assert not store.put_if_absent("x", b"other")
    assert store.read("x") == b"from a file"


def test_one_of_eight_racing_writers_wins(store: Store) -> None:
    start = threading.Barrier(8)

    def write(number: int) -> bool:
        start.wait()
        return store.put_if_absent("x", f"writer {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert store.read("x") == f"writer {won.index(True)}".encode()


def test_compare_and_swap_refuses_an_old_version(store: Store) -> None:
    assert store.compare_and_swap("x", b"first", None)
    first = store.stat("x")
    assert first and store.compare_and_swap("x", b"second", first.version)
    assert not store.compare_and_swap("x", b"third", first.version)
    assert not store.compare_and_swap("x", b"third", None)
    assert not store.compare_and_swap("absent", b"third", first.version)
    assert store.read("x") == b"second" and store.stat("absent") is None


def test_list_gives_names_by_prefix_in_order(store: Store) -> None:
    assert list(store.list("")) == []
    for name in ("b/two", "b/deep/er", "a", "bc"):
        store.put_if_absent(name, name.encode())
    assert list(store.list("")) == [("a", 1), ("b/deep/er", 9), ("b/two", 5), ("bc", 2)]
    assert [name for name, _ in store.list("b/")] == ["b/deep/er", "b/two"]
    assert [name for name, _ in store.list("b")] == ["b/deep/er", "b/two", "bc"]
    assert list(store.list("absent/")) == []


def test_probe_leaves_nothing_behind(store: Store) -> None:
    store.probe()
    assert list(store.list("")) == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "", "a//b", "a/", "./a", "a\nb", "a\0b", "a/.."])
def test_names_that_could_leave_the_root_are_refused(store: Store, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for act in (
        lambda: store.stat(name),
        lambda: store.read(name),
        lambda: store.get(name, tmp_path / "to"),
        lambda: store.put(name, tmp_path / "file"),
        lambda: store.put_if_absent(name, b"x"),
        lambda: store.compare_and_swap(name, b"x", None),
    ):
        with pytest.raises(errors.ConfigError, match="cannot be an object's name"):
            act()


def test_an_unknown_scheme_is_answered_with_the_known_ones() -> None:
    for uri in ("ftp://host/x", "local://x", "GSS://x"):
        with pytest.raises(errors.ConfigError, match=r"file://, gs://"):
            open_store(uri)


def test_a_scheme_is_found_by_its_file_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mem.py").write_text("def open_store(uri): return uri")
    monkeypatch.setattr("pipeline.storage.__path__", [str(tmp_path)])
    assert open_store("mem://x") == "mem://x"


# ---- local


def test_a_file_uri_is_a_folder(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/with%20space").put_if_absent("x", b"1")
    assert (tmp_path / "with space" / "x").read_bytes() == b"1"
    with pytest.raises(errors.ConfigError, match="file:///absolute/path"):
        open_store("file://host/path")


def test_an_unwritable_folder_is_not_allowed(locked_folder: Path) -> None:
    with pytest.raises(errors.NotAllowed, match="Permission denied"):
        open_store(str(locked_folder / "bucket")).probe()


def test_a_file_where_the_folder_should_be_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(errors.ConfigError, match="taken"):
        open_store(str(tmp_path / "taken")).probe()


def test_a_full_disk_is_the_machines_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    store = open_store(str(tmp_path))
    monkeypatch.setattr(local, "sync", full)
    with pytest.raises(errors.MachineError, match="No space left"):
        store.put_if_absent("x", b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_drive_without_hard_links_writes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    store = open_store(str(tmp_path))
    assert store.put_if_absent("x", b"one") and not store.put_if_absent("x", b"two")
    assert store.read("x") == b"one" and len(list(tmp_path.iterdir())) == 1


# ---- gs


def test_a_missing_bucket_is_missing_input(gcs_bucket_uri: str) -> None:
    store = open_store("gs://no-such-bucket-here/x")
    with pytest.raises(errors.InputMissing, match="no-such-bucket-here"):
        store.probe()
    with pytest.raises(errors.InputMissing, match="no-such-bucket-here"):
        list(store.list(""))
    with pytest.raises(errors.ConfigError, match="names no bucket"):
        open_store("gs:///x")


def test_a_dead_endpoint_is_unavailable_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(gs, "DEADLINE_SECONDS", 0.2)
    store = open_store("gs://bucket/x")
    for act in (store.probe, lambda: store.stat("x"), lambda: store.read("x"), lambda: list(store.list(""))):
        with pytest.raises(errors.ServiceUnavailable, match=r"did not answer within 0\.2 s"):
            act()


def test_a_wrong_checksum_is_a_transfer_error_and_leaves_no_file(
    gcs_bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(gcs_bucket_uri)
    store.put_if_absent("x", b"data")
    monkeypatch.setattr(gs, "crc32c_of", lambda path: "AAAAAA==")
    with pytest.raises(errors.TransferError, match="CRC-32C"):
        store.get("x", tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


def test_a_stored_gzip_object_arrives_as_stored(gcs_bucket_uri: str, tmp_path: Path) -> None:
    import gzip

    store = open_store(gcs_bucket_uri)
    packed = gzip.compress(b"quote")
    blob = gs.connect().bucket(gcs_bucket_uri[5:]).blob("x.txt")
    blob.content_encoding = "gzip"
    blob.upload_from_string(packed)
    store.get("x.txt", tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == packed == store.read("x.txt")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, errors.ConfigError),
        (401, errors.NotAllowed),
        (403, errors.NotAllowed),
        (404, errors.InputMissing),
        (412, errors.TransferError),
        (429, errors.ServiceUnavailable),
        (503, errors.ServiceUnavailable),
    ],
)
def test_each_status_has_its_exit_code(code: int, kind: type[errors.QuotesmithError]) -> None:
    with pytest.raises(kind, match="gs://b/x") as caught, gs.translated("gs://b/x"):
        raise api.from_http_status(code, "the server's words")
    assert isinstance(caught.value.__cause__, api.GoogleAPICallError)
    assert caught.value.exit_code == kind.exit_code
