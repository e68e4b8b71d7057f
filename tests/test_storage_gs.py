from __future__ import annotations

import os
from pathlib import Path

import pytest
from google.api_core import exceptions as api

from pipeline import errors
from pipeline.storage import gs, open_store
from tests.fault_proxy import before


def test_a_missing_bucket_is_missing_input(gcs_bucket_uri: str) -> None:
    store = open_store("gs://no-such-bucket-here/x")
    with pytest.raises(errors.InputMissing, match="no-such-bucket-here"):
        store.probe()
    with pytest.raises(errors.InputMissing, match="no-such-bucket-here"):
        list(store.list(""))
    with pytest.raises(errors.ConfigError, match="names no bucket"):
        open_store("gs:///x")


def test_a_dead_endpoint_is_unavailable_within_the_deadline(dead_gcs: None) -> None:
    store = open_store("gs://bucket/x")
    for act in (store.probe, lambda: store.stat("x"), lambda: store.read("x"), lambda: list(store.list(""))):
        with pytest.raises(errors.ServiceUnavailable, match=r"does not answer.* within 5 s"):
            act()


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


def test_a_small_write_is_one_request_and_a_read_two(gcs_bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with before(os.environ["STORAGE_EMULATOR_HOST"]) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        store = open_store(gcs_bucket_uri)
        assert store.put_if_absent("x", b"1")
        assert proxy.requests == 1
        assert store.read("x") == b"1"
        assert proxy.requests == 3


def test_a_read_asks_for_the_version_that_was_looked_up(gcs_bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(gcs_bucket_uri)
    store.put_if_absent("x", b"0123456789")
    found = store.stat("x")
    session, asked = store.requests.bucket.client._http, []
    request = session.request

    def noted(method: str, url: str, **options: object) -> object:
        asked.append((url, options["headers"]))
        return request(method, url, **options)

    monkeypatch.setattr(session, "request", noted)
    taken: list[bytes] = []
    store.requests.fetch("x", found, 4, taken.append)
    assert b"".join(taken) == b"456789"
    # fake-gcs-server takes no notice of it; Google's server answers 412 when there is another one now.
    assert f"ifGenerationMatch={found.version}" in asked[0][0]


def test_a_removal_of_what_is_gone_is_no_error(gcs_bucket_uri: str) -> None:
    store = open_store(gcs_bucket_uri)
    store.put_if_absent("x", b"1")
    found = store.stat("x")
    for _ in range(2):
        store.requests.remove("x", found.version)
    assert store.stat("x") is None
