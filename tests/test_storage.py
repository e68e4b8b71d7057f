"""One contract for every scheme; then names and schemes. What is special about a scheme is in its own test file."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import bucket, errors, process, storage
from pipeline.errors import ConfigError
from pipeline.redact import HIDDEN, redact
from pipeline.storage import PROBE, Store, crc32c_of, open_store, probe_name


@pytest.fixture(params=["local", "gs", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "bucket")
    root = request.getfixturevalue({"gs": "gcs_bucket_uri", "s3": "s3_bucket_uri"}[request.param])
    return f"{root}/some/prefix"


@pytest.fixture
def store(uri: str) -> Store:
    return open_store(uri)


@pytest.mark.parametrize("size", [0, 1, 9_000_000, 33_600_000])  # one request; resumable on gs://; in parts
def test_an_object_comes_back_as_it_was_put(store: Store, tmp_path: Path, size: int) -> None:
    source, back = tmp_path / "source", tmp_path / "new folder" / "back"
    source.write_bytes(os.urandom(size))
    store.put("a/b.bin", source)
    assert store.read("a/b.bin") == source.read_bytes()
    store.get("a/b.bin", back)
    assert back.read_bytes() == source.read_bytes()
    assert [path.name for path in back.parent.iterdir()] == ["back"]
    found = store.stat("a/b.bin")
    assert found and found.size == size and found.crc32c == crc32c_of(source)


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
    assert store.stat("absent") is None and store.stat("folder/there/absent") is None
    with pytest.raises(errors.InputMissing, match="absent"):
        store.read("absent")
    with pytest.raises(errors.InputMissing, match="absent"):
        store.get("absent", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_what_would_fill_the_memory_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_if_absent("marker", b"12345")
    monkeypatch.setattr(storage, "LARGEST_READ", 5)
    assert store.read("marker") == b"12345"
    monkeypatch.setattr(storage, "LARGEST_READ", 4)
    with pytest.raises(errors.DataError, match="marker has 5 bytes; needed at most 4"):
        store.read("marker")


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


def test_a_removed_object_is_gone_and_what_is_not_there_can_be_removed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")
    store.put_if_absent("a/x", b"x")
    store.put_if_absent("a/xy", b"xy")
    store.put("a/x", tmp_path / "file")
    for _ in range(2):
        store.remove("a/x")
        assert store.stat("a/x") is None and list(store.list("")) == [("a/xy", 2)]
    store.remove("absent/deep")
    assert store.put_if_absent("a/x", b"again") and store.read("a/x") == b"again"


def test_probe_leaves_nothing_behind(store: Store) -> None:
    store.probe()
    assert list(store.list("")) == []


@pytest.mark.skipif(not process.BOOT_ID.exists(), reason="the system has no /proc")
def test_the_probe_of_a_killed_process_is_cleared_up_and_that_of_a_live_one_is_not(store: Store) -> None:
    gone = process.signature().rpartition(".")[0] + ".1"  # what had this process's number before
    living = probe_name()
    store.put_if_absent(living.replace(process.signature(), gone), b"probe")
    store.put_if_absent(living, b"probe")
    store.clear_up("runs/a")
    assert [name for name, _ in store.list("")] == [living]


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_the_probe_of_a_process_elsewhere_is_cleared_up_after_an_hour(
    scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(request.getfixturevalue({"gs": "gcs_bucket_uri", "s3": "s3_bucket_uri"}[scheme]))
    monkeypatch.setattr(process, "signature", lambda: "")
    now, names = time.time(), {}
    for minutes in (-90, -30, 30, 90):
        with monkeypatch.context() as patch:
            patch.setattr(storage.time, "time", lambda at=now + 60 * minutes: at)
            names[minutes] = probe_name()
            store.put_if_absent(names[minutes], b"probe")
    store.put_if_absent(f"{PROBE}_0123", b"probe")  # as earlier versions called it
    store.clear_up("runs/a")
    assert {name for name, _ in store.list("")} == {names[-30], names[30]}


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_probe_that_comes_back_otherwise_is_removed_too(
    scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(request.getfixturevalue({"gs": "gcs_bucket_uri", "s3": "s3_bucket_uri"}[scheme]))
    monkeypatch.setattr(store, "read", lambda name: b"other")
    with pytest.raises(errors.TransferError, match="did not give back"):
        store.probe()
    assert list(store.list("")) == []


@pytest.mark.parametrize("name", ["a b+c", "100%2F.txt", "Büro/q&a=1?.txt", "#x;y", "a\\b", "…/.hidden"])
def test_odd_names_are_kept_as_they_are(store: Store, name: str) -> None:
    assert store.put_if_absent(name, b"x")
    assert list(store.list("")) == [(name, 1)]
    assert store.read(name) == b"x"


def test_a_large_file_is_put_once_only(store: Store, tmp_path: Path) -> None:
    if store.uri.startswith("gs://"):
        pytest.skip("fake-gcs-server ignores the precondition of a resumable upload; Google's server does not")
    (tmp_path / "file").write_bytes(bytes(17_000_000))
    assert store.put_if_absent("x", tmp_path / "file")
    (tmp_path / "file").write_bytes(b"y" * 17_000_000)
    assert not store.put_if_absent("x", tmp_path / "file")
    assert store.read("x") == bytes(17_000_000)


def test_a_listing_of_several_pages_is_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "PAGE_OBJECTS", 10)
    names = [f"n/{number:04d}" for number in range(25)]
    for name in names:
        store.put_if_absent(name, b"")
    assert [name for name, _ in store.list("n/")] == names


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
        lambda: store.remove(name),
    ):
        with pytest.raises(errors.ConfigError, match="cannot be an object's name"):
            act()


@pytest.mark.parametrize("prefix", ["../", "a/../../x", "/etc/", "a\nb/"])
def test_no_listing_leaves_the_root(store: Store, prefix: str) -> None:
    with pytest.raises(errors.ConfigError, match="cannot be an object's name"):
        list(store.list(prefix))


def test_an_unknown_scheme_is_answered_with_the_known_ones() -> None:
    for uri in ("ftp://host/x", "local://x", "GSS://x"):
        with pytest.raises(errors.ConfigError, match=r"file://, gs://, s3://$"):
            open_store(uri)


def test_a_scheme_is_found_by_its_file_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mem.py").write_text("def open_store(uri): return uri")
    monkeypatch.setattr("pipeline.storage.__path__", [str(tmp_path)])
    assert open_store("mem://x") == "mem://x"


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("place", ["key:secret@bucket/x", "secret@bucket", "bucket/a\nb", "bucket/\udcff"])
def test_a_buckets_uri_with_a_user_or_what_no_name_can_have_is_refused(scheme: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(f"{scheme}://{place}")
    assert "secret" not in redact(str(caught.value)).replace(HIDDEN, "")
    assert str(caught.value).isprintable()
