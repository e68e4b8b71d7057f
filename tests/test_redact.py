from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator

import click
import pytest

import entrypoint
from pipeline import logs
from pipeline.errors import ServiceUnavailable
from pipeline.redact import HIDDEN, redact, redacted

leak = pytest.mark.fault(
    "secrets", "keys, tokens and signatures in URLs, headers, files' names, the environment", "hidden"
)

SECRET = "s3cr3tV4lue/with+signs=="
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"
LEAKS = [
    f"GET https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature={SECRET}&x=1",
    f"https://b.s3.amazonaws.com/k?X-Amz-Credential={SECRET}/20260101/us-east-1/s3/aws4_request",
    f"https://b.s3.amazonaws.com/k?X-Amz-Security-Token={SECRET}",
    f"https://storage.googleapis.com/b/o?X-Goog-Signature={SECRET}&X-Goog-Date=1",
    f"https://storage.googleapis.com/upload/b/o?uploadType=resumable&upload_id={SECRET}: 503",
    f"https://acct.blob.core.windows.net/c/b?sv=1&sig={SECRET}",
    f"https://host/x?access_token={SECRET}",
    f"https://host/x?KEY={SECRET}&alt=media",
    f'{{"access_token": "{SECRET}", "expires_in": 3599}}',
    f"{{'aws_secret_access_key': '{SECRET}'}}",
    f"aws_session_token = {SECRET}",
    f"AWS_SECRET_ACCESS_KEY={SECRET}",
    f"HF_TOKEN={SECRET}",
    f"api_token: {SECRET}",
    f"Authorization: AWS4-HMAC-SHA256 Credential=A/1/s3/aws4_request, Signature={SECRET}",
    f"{{'Authorization': 'Bearer {SECRET}'}}",
    f"x-amz-security-token: {SECRET}",
    f"refused the header Bearer {SECRET}",
    "https://user:s3cr3tV4lue@host/path",
    "https://s3cr3tV4lue@host/path",
    "s3://KEY:s3cr3tV4lue@bucket/quotes",
    f"-----BEGIN RSA PRIVATE KEY-----\nMIIE{SECRET}\n-----END RSA PRIVATE KEY-----",
    f"-----BEGIN PRIVATE KEY-----\nMIIE{SECRET}",
]


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.basicConfig(level=level, handlers=handlers, force=True)


@leak
@pytest.mark.parametrize("text", LEAKS)
def test_a_secret_is_known_by_its_place(text: str) -> None:
    assert HIDDEN in redact(text)
    assert "s3cr3tV4lue" not in redact(text)


@leak
@pytest.mark.parametrize(
    "token",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "ASIAIOSFODNN7EXAMPLE",
        "ya29.a0AfH6SMBx-1234567890",
        "hf_abcdefghijklmnopqrst",
        "AIzaSyA1234567890abcdefghijklmnopqrstu",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        JWT,
    ],
)
def test_a_token_is_known_by_its_look(token: str) -> None:
    assert redact(f"the server said: {token} is not allowed") == f"the server said: {HIDDEN} is not allowed"


@leak
@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_PASSWORD", "AZURE_STORAGE_KEY"])
def test_what_the_environment_calls_a_secret_is_hidden_anywhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "correct/horse battery")
    assert redact("I got correct/horse battery, as correct%2Fhorse%20battery") == f"I got {HIDDEN}, as {HIDDEN}"


@pytest.mark.parametrize(
    "text",
    [
        "https://host/x?X-Amz-Date=20260101&X-Amz-Expires=3600",
        "tokens: 181 quotes, 3900 tokens, key facts, password-free",
        "gs://bucket/runs/abc/objects/sha256/" + "0123456789abcdef" * 4,
        "Bearer certificates are financial instruments; Basic understanding helps",
        "tokens.max_length is 128, but the base model has 64 positions",
        "s3://bucket/x: 403 Forbidden; give this job's account the right to read",
        "postgres://host:5432/x, ratio 12:30@noon",
    ],
)
def test_what_is_no_secret_stays(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "password-free")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "gs://bucket")
    monkeypatch.setenv("SOME_SECRET", "128")
    assert redact(text) == text


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_log_line_holds_a_secret(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(log_format)
    log = logging.getLogger("any.library")
    log.warning("%s", LEAKS[0])
    try:
        raise ValueError(LEAKS[3])
    except ValueError:
        log.exception("failed with %r", LEAKS[6])
    lines = capsys.readouterr().err
    assert "ValueError" in lines and lines.count(HIDDEN) >= 3
    assert "s3cr3tV4lue" not in lines
    if log_format == "json":
        assert [json.loads(line)["logger"] for line in lines.splitlines()] == ["any.library"] * 2


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_librarys_thread_that_fails_says_so_in_one_line_without_a_secret(
    log_format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(28, LEAKS[0])

    monkeypatch.setattr(threading, "excepthook", None)
    logs.configure(log_format)
    thread = threading.Thread(target=fail, name="writer")
    thread.start()
    thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert "writer ended with OSError: [Errno 28]" in line and HIDDEN in line and "s3cr3tV4lue" not in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ServiceUnavailable(f"no answer from {LEAKS[0]}"), 69),
        (RuntimeError(LEAKS[0]), 70),
        (OSError(22, LEAKS[0]), 70),
        (click.UsageError(LEAKS[0]), 2),
    ],
)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_last_word_of_the_job_holds_a_secret(
    error: Exception, code: int, log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    logs.configure(log_format)
    assert entrypoint.exit_code_of(command) == code
    said = capsys.readouterr().err
    assert HIDDEN in said and "s3cr3tV4lue" not in said


def test_every_text_within_is_redacted() -> None:
    found = redacted({"a": [{"b": "s3://key:s3cr3tV4lue@bucket/x"}, 1, None], "x?sig=s3cr3tV4lue": True})
    assert found == {"a": [{"b": f"s3://{HIDDEN}bucket/x"}, 1, None], f"x?sig={HIDDEN}": True}
