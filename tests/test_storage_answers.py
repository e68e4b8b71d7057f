"""What answers at a bucket's address is no bucket, or lies: an error in a sentence, and nothing left on the disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import retrying
from pipeline.errors import ConfigError, InputMissing, QuotesmithError, ServiceUnavailable, TransferError
from pipeline.storage import Store, crc32c_of, open_store

Answer = Callable[[BaseHTTPRequestHandler], None]
GROUP = "what answers for a bucket"
MIB = 1 << 20


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer: Answer

    def handle_any(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).answer(self)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def log_message(self, *_: object) -> None: ...


def reply(body: bytes = b"", status: int = 200, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return answer


def of_json(content: object) -> Answer:
    return reply(json.dumps(content).encode(), Content_Type="application/json")


def endless(handler: BaseHTTPRequestHandler) -> None:
    """An object of three bytes that does not end."""
    is_data = handler.command == "GET" and "alt=media" in handler.path + "alt=media" * ("/p/x" in handler.path)
    if not is_data:
        known = {"name": "p/x", "size": "3", "generation": "1"}
        return reply(json.dumps(known).encode() if handler.command == "GET" else b"abc", ETag='"a"')(handler)
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.send_header("ETag", '"a"')
    handler.end_headers()
    handler.close_connection = True
    try:
        while True:
            handler.wfile.write(b"%x\r\n%s\r\n" % (MIB, b"x" * MIB))
    except OSError:
        return


LOG_IN = b"<html><body>Log in to the network</body></html>"
NO_BUCKETS = {
    "a page to log in": reply(LOG_IN, Content_Type="text/html"),
    "a page that is XML": reply(b"<?xml version='1.0'?>" + LOG_IN, Content_Type="text/html"),
    "nothing": reply(),
    "an empty object": of_json({}),
    "a list": of_json([]),
    "null": of_json(None),
    "numbers that are none": of_json({"size": "many", "generation": "one", "items": [{"name": None, "size": "x"}]}),
    "a list of texts": of_json({"items": ["x"]}),
    "a negative size": of_json({"name": "p/x", "size": "-3", "generation": "1"}),
    "a redirect to itself": reply(status=302, Location="/again"),
    "a redirect to nowhere": reply(status=307),
    "half an answer": reply(b"abc", status=206),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Handler]]:
    class Mine(Handler): ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    listening.daemon_threads = True
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{listening.server_port}"
    account = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {"STORAGE_EMULATOR_HOST": address, "AWS_ENDPOINT_URL": address, **account}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retrying, "BUDGET_SECONDS", 30.0)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_SECONDS", 1000.0)  # so that there is one try
    yield Mine
    listening.shutdown()


def acts(store: Store, folder: Path) -> dict[str, Callable[[], object]]:
    file = folder / "file"
    file.write_bytes(b"quotes")
    return {
        "stat": lambda: store.stat("x"),
        "read": lambda: store.read("x"),
        "get": lambda: store.get("x", folder / "to" / "x"),
        "put": lambda: store.put("x", file),
        "put if absent": lambda: store.put_if_absent("x", b"quotes"),
        "swap": lambda: store.compare_and_swap("x", b"quotes", "1"),
        "list": lambda: list(store.list("a")),
        "remove": lambda: store.remove("x"),
        "probe": store.probe,
    }


@pytest.mark.fault(GROUP, "a page to log in, redirects, JSON of another kind", "an error in one sentence")
@pytest.mark.parametrize("answer", NO_BUCKETS)
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_what_is_no_bucket_is_an_error_in_a_sentence(
    scheme: str, answer: str, server: type[Handler], tmp_path: Path
) -> None:
    server.answer = NO_BUCKETS[answer]
    for name, act in acts(open_store(f"{scheme}://bucket/p"), tmp_path).items():
        try:
            act()
        except QuotesmithError as e:
            assert "\n" not in str(e) and f"{scheme}://bucket/p" in str(e), (name, e)
        else:  # in what it did not ask about
            assert name not in ("read", "get", "probe")
    assert not (tmp_path / "to" / "x").exists()


@pytest.mark.fault(GROUP, "an object without an end, a list without an end", "given up after its size, after a page")
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_an_object_is_not_read_past_its_size(scheme: str, server: type[Handler], tmp_path: Path) -> None:
    server.answer = endless
    store = open_store(f"{scheme}://bucket/p")
    for act in (lambda: store.get("x", tmp_path / "to" / "x"), lambda: store.read("x")):
        with pytest.raises(TransferError, match="sent more than its 3 bytes"):
            act()
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.fault(GROUP, "an upload in pieces that the server has lost", "sent anew, and whole")
@pytest.mark.parametrize("status", [404, 410])
def test_an_upload_that_the_server_has_lost_is_begun_anew(
    status: int, server: type[Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that is not there is another matter: that says the first request."""
    methods: list[str] = []

    def loses_one(handler: BaseHTTPRequestHandler) -> None:
        methods.append(handler.command)
        if handler.command == "POST":
            return reply(Location=f"http://{handler.headers['Host']}/session")(handler)
        if methods.count("PUT") == 1:
            return reply(b"gone", status)(handler)
        place, _, total = handler.headers["Content-Range"].removeprefix("bytes ").partition("/")
        if int(place.partition("-")[2]) + 1 < int(total):
            return reply(status=308, Range=f"bytes=0-{place.partition('-')[2]}")(handler)
        known = {"name": "p/x", "size": total, "generation": "1", "crc32c": crc32c_of(tmp_path / "file")}
        return of_json(known)(handler)

    server.answer = loses_one
    monkeypatch.setattr(retrying, "PIECE_BYTES", 8 * MIB)  # less goes in one request
    monkeypatch.setattr(retrying, "FIRST_PAUSE_SECONDS", 0.01)
    (tmp_path / "file").write_bytes(b"x" * 9 * MIB)
    store = open_store("gs://bucket/p")
    store.put_if_absent("x", tmp_path / "file")
    assert methods[:3] == ["POST", "PUT", "POST"]
    server.answer = reply(b"no bucket", 404)
    with pytest.raises(InputMissing):
        store.put_if_absent("x", tmp_path / "file")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_list_without_an_end_is_given_up(scheme: str, server: type[Handler]) -> None:
    page = {
        "gs": of_json({"items": [{"name": "p/a", "size": "3"}], "nextPageToken": "on"}),
        "s3": reply(
            b"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>on</NextContinuationToken>"
            b"<Contents><Key>p/a</Key><Size>3</Size></Contents></ListBucketResult>"
        ),
    }
    server.answer = page[scheme]
    with pytest.raises(ServiceUnavailable, match="a list without an end"):
        list(open_store(f"{scheme}://bucket/p").list("a"))


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"[]", b'{"type": "service_account", "private_key": "x"}'])
def test_credentials_that_cannot_be_read_are_a_wrong_setting(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    monkeypatch.setattr(retrying, "BUDGET_SECONDS", 30.0)
    with pytest.raises(ConfigError, match="credentials"):
        open_store("gs://bucket/p").stat("x")


def test_certificates_that_are_not_there_are_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # Google's library would look for its metadata server first, for seconds
    with pytest.raises(ConfigError, match="REQUESTS_CA_BUNDLE"):
        open_store("gs://bucket/p").stat("x")
