from __future__ import annotations

import hashlib
import socket
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import exceptions as api

from pipeline import errors, retrying
from pipeline.bucket import Overtaken
from pipeline.storage import open_store, s3


@pytest.fixture
def client(s3_bucket_uri: str) -> Any:
    return boto3.client("s3", region_name="us-east-1")


def test_a_missing_bucket_is_missing_input(s3_bucket_uri: str) -> None:
    store = open_store("s3://no-such-bucket-here/x")
    with pytest.raises(errors.InputMissing, match="no-such-bucket-here"):
        store.probe()
    with pytest.raises(errors.InputMissing, match="no-such-bucket-here"):
        list(store.list(""))
    with pytest.raises(errors.InputMissing, match="no-such-bucket-here"):
        store.compare_and_swap("x", b"x", '"etag"')
    with pytest.raises(errors.ConfigError, match="names no bucket"):
        open_store("s3:///x")


def test_an_impossible_bucket_name_is_a_wrong_setting(s3_bucket_uri: str) -> None:
    with pytest.raises(errors.ConfigError, match="Invalid bucket name"):
        open_store("s3://UPPER case").probe()


def test_a_dead_endpoint_is_unavailable_within_the_budget(s3_bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setattr(retrying, "BUDGET_SECONDS", 5.0)
        store = open_store("s3://bucket/x")
        for act in (store.probe, lambda: store.stat("x"), lambda: store.read("x"), lambda: list(store.list(""))):
            started = time.monotonic()
            with pytest.raises(errors.ServiceUnavailable, match="Could not connect"):
                act()
            assert time.monotonic() - started < 10


@contextmanager
def answering(said: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What listens at the endpoint says this once it has some of a request, and ends the connection."""

    def answer() -> None:
        with suppress(OSError):  # the test is over
            while True:
                with listening.accept()[0] as connection:
                    connection.recv(65536)
                    connection.sendall(said)
                    connection.shutdown(socket.SHUT_WR)
                    time.sleep(0.2)  # with more of the request unread, the other side could not read the answer

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setattr(retrying, "BUDGET_SECONDS", 5.0)
        yield


def test_a_connection_that_ends_within_the_leave_to_send_is_tried_again_and_no_thread_goes_on(
    s3_bucket_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        answering(b"HTTP/1.1 100 Continue\r\n", monkeypatch),
        pytest.raises(errors.ServiceUnavailable, match=r"tried [2-9] times"),
    ):
        open_store("s3://bucket/x").put_if_absent("x", b"x")
    for thread in threading.enumerate():
        if thread.name.startswith("transfer s3://bucket/x"):
            thread.join(5)
            assert not thread.is_alive()


def test_a_refusal_that_comes_before_the_body_is_read_is_told(
    s3_bucket_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    why = b"<Error><Code>AccessDenied</Code><Message>the server's words</Message></Error>"
    (tmp_path / "file").write_bytes(bytes(20_000_000))
    refused = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s" % (len(why), why)
    with answering(refused, monkeypatch), pytest.raises(errors.NotAllowed, match="AccessDenied the server's words"):
        open_store("s3://bucket/x").put_if_absent("x", tmp_path / "file")


def test_an_unusable_endpoint_is_a_wrong_setting(s3_bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    with pytest.raises(errors.ConfigError, match="Invalid endpoint"):
        open_store("s3://bucket/x").stat("x")


def test_an_unknown_profile_is_a_wrong_setting(s3_bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(errors.ConfigError, match="nobody"):
        open_store("s3://bucket/x").stat("x")


def test_without_credentials_requests_go_unsigned_and_a_refusal_says_so(
    s3_bucket_uri: str, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client.put_object(Bucket=s3_bucket_uri[5:], Key="public", Body=b"1", ACL="public-read")
    client.put_object(Bucket=s3_bucket_uri[5:], Key="private", Body=b"1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    store = open_store(s3_bucket_uri)
    assert store.read("public") == b"1"
    with pytest.raises(errors.NotAllowed, match="no AWS credentials were found"):
        store.read("private")


def test_without_boto3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "pipeline.storage.s3")
    with pytest.raises(errors.ConfigError, match=r"pip install 'quotesmith\[s3\]'"):
        open_store("s3://bucket/x")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retrying, "PIECE_BYTES", 5 * 1024 * 1024)  # the least that S3 takes
    yield


def test_a_large_file_goes_up_in_parts_under_one_checksum(
    s3_bucket_uri: str, client: Any, tmp_path: Path, small_parts: None
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 45_000)
    assert open_store(s3_bucket_uri).put_if_absent("x", tmp_path / "file")
    there = client.head_object(Bucket=s3_bucket_uri[5:], Key="x", ChecksumMode="ENABLED")
    assert there["ETag"].endswith('-3"') and there["ContentLength"] == 11_520_000
    assert there["ChecksumCRC32C"] == s3.crc32c_of(tmp_path / "file")


@pytest.mark.parametrize("act", ["upload_part", "complete_multipart_upload"])
def test_an_upload_in_parts_that_fails_leaves_no_parts(
    s3_bucket_uri: str, client: Any, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    (tmp_path / "file").write_bytes(bytes(6_000_000))
    store = open_store(s3_bucket_uri)

    def refused(**_: object) -> None:
        raise refusal(403, "AccessDenied")

    monkeypatch.setattr(store.requests.client, act, refused)
    with pytest.raises(errors.NotAllowed):
        store.put("x", tmp_path / "file")
    assert "Uploads" not in client.list_multipart_uploads(Bucket=s3_bucket_uri[5:])
    assert store.stat("x") is None


def test_a_conflict_is_tried_again(s3_bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_bucket_uri)
    put, answers = store.requests.client.put_object, iter([refusal(409, "ConditionalRequestConflict")] * 2)

    def conflicting(**request: object) -> object:
        for error in answers:
            raise error
        return put(**request)

    monkeypatch.setattr(retrying, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(store.requests.client, "put_object", conflicting)
    assert store.put_if_absent("x", b"1")
    assert store.read("x") == b"1"


def test_a_foreign_object_is_checked_by_its_md5(s3_bucket_uri: str, client: Any) -> None:
    client.put_object(Bucket=s3_bucket_uri[5:], Key="x", Body=b"foreign", ChecksumAlgorithm="SHA256")
    found = open_store(s3_bucket_uri).stat("x")
    assert found and found.crc32c is None
    assert found.md5 == b64encode(hashlib.md5(b"foreign").digest()).decode()
    assert open_store(s3_bucket_uri).read("x") == b"foreign"


@pytest.mark.parametrize("name", ["a\x01b", "a/../b", "/a"])
def test_a_hostile_name_in_a_real_listing_is_refused(s3_bucket_uri: str, client: Any, name: str) -> None:
    client.put_object(Bucket=s3_bucket_uri[5:], Key=f"in/{name}", Body=b"x")
    with pytest.raises(errors.DataError, match="rename or delete it"):
        list(open_store(s3_bucket_uri).list("in/"))


@pytest.mark.parametrize(
    ("answer", "crc32c", "md5"),
    [
        ({"ETag": f'"{"0" * 32}"', "ChecksumCRC32C": "AAAAAA=="}, "AAAAAA==", "A" * 22 + "=="),
        ({"ETag": f'"{"0" * 32}-2"', "ChecksumCRC32C": "AAAAAA==-2"}, None, None),
        ({"ETag": f'"{"0" * 32}-2"', "ChecksumCRC32C": "AAAAAA==", "ChecksumType": "COMPOSITE"}, None, None),
        ({"ETag": f'"{"0" * 32}"', "ServerSideEncryption": "aws:kms"}, None, None),
        ({"ETag": f'"{"0" * 32}"', "SSECustomerAlgorithm": "AES256"}, None, None),
        ({"ETag": f'"{"0" * 32}"', "ServerSideEncryption": "AES256"}, None, "A" * 22 + "=="),
    ],
)
def test_only_checksums_of_the_whole_plain_object_are_believed(
    answer: dict[str, str], crc32c: str | None, md5: str | None
) -> None:
    assert (s3.crc32c_from(answer), s3.md5_from(answer)) == (crc32c, md5)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "InvalidRequest", errors.ConfigError),
        (400, "RequestTimeout", errors.ServiceUnavailable),
        (400, "BadDigest", errors.TransferError),
        (400, "ExpiredToken", errors.NotAllowed),
        (401, "Unauthorized", errors.NotAllowed),
        (403, "AccessDenied", errors.NotAllowed),
        (404, "NoSuchKey", errors.InputMissing),
        (404, "NoSuchUpload", errors.TryLater),
        (409, "ConditionalRequestConflict", errors.TryLater),
        (412, "PreconditionFailed", Overtaken),
        (429, "TooManyRequests", errors.ServiceUnavailable),
        (503, "SlowDown", errors.ServiceUnavailable),
    ],
)
def test_each_answer_has_its_exit_code(status: int, code: str, kind: type[errors.QuotesmithError]) -> None:
    with pytest.raises(kind, match=f"s3://b/x: {code} the server's words") as caught, s3.translated("s3://b/x"):
        raise refusal(status, code)
    assert isinstance(caught.value.__cause__, api.ClientError) and type(caught.value) is kind


def refusal(status: int, code: str) -> api.ClientError:
    answer = {"Error": {"Code": code, "Message": "the server's words"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return api.ClientError(answer, "PutObject")  # type: ignore[arg-type]


def test_a_read_is_of_the_version_that_was_looked_up(s3_bucket_uri: str) -> None:
    store = open_store(s3_bucket_uri)
    store.put_if_absent("x", b"old")
    found = store.stat("x")
    assert found and store.compare_and_swap("x", b"new", found.version)
    taken: list[bytes] = []
    with pytest.raises(Overtaken):
        store.requests.fetch("x", found, 0, taken.append)
    assert taken == []


def test_a_removal_of_what_is_gone_is_no_error(s3_bucket_uri: str) -> None:
    store = open_store(s3_bucket_uri)
    store.put_if_absent("x", b"1")
    found = store.stat("x")
    for _ in range(2):
        store.requests.remove("x", found.version)
    assert store.stat("x") is None
