"""Google Cloud Storage, with default credentials or, where there are none, anonymously. Every write names the
generation it replaces, so that a retried write cannot undo somebody else's."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import requests
import urllib3
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY

from pipeline.errors import (
    ConfigError,
    InputMissing,
    NotAllowed,
    QuotesmithError,
    ServiceUnavailable,
    TransferError,
    TryLater,
)
from pipeline.storage import Stat, check_name, crc32c_of
from pipeline.storage.local import translated as disk_errors_translated

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 60.0  # retries of one request stop then; the SDK's own default is 120 s
TIMEOUT_SECONDS = (10, 60)  # to connect, and between two packets
WRITE_ATTEMPTS = 5  # when somebody else writes the same object meanwhile
BUSY = (408, 429)
UNREACHABLE = (
    api.RetryError,
    auth.GoogleAuthError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    ConnectionError,
)


def open_store(uri: str) -> GsStore:
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    if not bucket:
        raise ConfigError(f"{uri} names no bucket; write gs://bucket/prefix")
    return GsStore(bucket, prefix.strip("/"))


class GsStore:
    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket_name = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"gs://{bucket}/{prefix}".rstrip("/")

    @cached_property
    def bucket(self) -> Any:
        try:
            return connect().bucket(self.bucket_name)
        except ValueError as e:
            raise ConfigError(f"{self.uri} has an impossible bucket name: {e}") from e

    def stat(self, name: str) -> Stat | None:
        blob = self._blob_if_there(name)
        return blob and Stat(blob.size, str(blob.generation), blob.md5_hash, blob.crc32c)

    def get(self, name: str, to: Path) -> None:
        blob = self._blob(name)
        temporary = to.with_name(f".{to.name}.{uuid.uuid4().hex}")
        with disk_errors_translated(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                with translated(self._uri(name)):
                    blob.download_to_filename(temporary, raw_download=True, **same(blob), **patience())
                if blob.crc32c not in (None, crc32c_of(temporary)):  # some servers send none with the bytes
                    raise TransferError(f"{self._uri(name)} arrived with a wrong CRC-32C; try again")
                temporary.replace(to)
            finally:
                temporary.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        blob = self._blob(name)
        with translated(self._uri(name)):
            data: bytes = blob.download_as_bytes(raw_download=True, **same(blob), **patience())
            return data

    def put(self, name: str, path: Path) -> None:
        with disk_errors_translated(path):
            size, crc32c = path.stat().st_size, crc32c_of(path)
        for _ in range(WRITE_ATTEMPTS):
            found = self.stat(name)
            if found and (found.size, found.crc32c) == (size, crc32c):
                return
            if self._write(name, path, found.version if found else "0"):
                return
        raise TryLater(f"{self._uri(name)} keeps being written by somebody else; stop the other run or wait")

    def put_if_absent(self, name: str, data: bytes | Path) -> bool:
        return self._write(name, data, "0")

    def compare_and_swap(self, name: str, data: bytes, expected_version: str | None) -> bool:
        if self._write(name, data, expected_version or "0"):
            return True
        # This very write may have landed and its response been lost.
        return self._blob_if_there(name) is not None and self.read(name) == data

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        with translated(self.uri):
            blobs = self.bucket.client.list_blobs(
                self.bucket,
                prefix=self.prefix + prefix,
                fields="items(name,size),nextPageToken",
                **patience(),
            )
            for blob in blobs:
                if not blob.name.endswith("/"):  # the console's stand-ins for folders
                    yield blob.name.removeprefix(self.prefix), blob.size

    def probe(self) -> None:
        name = f".probe-{uuid.uuid4().hex}"
        self.put_if_absent(name, b"probe")
        if self.read(name) != b"probe":
            raise TransferError(f"{self.uri} did not give back what was written to it; try again")
        blob = self._blob(name)
        with translated(self._uri(name)):
            blob.delete(if_generation_match=blob.generation, **patience())

    def _write(self, name: str, data: bytes | Path, generation: str) -> bool:
        """False: the object's generation is another one ("0": it exists)."""
        blob = self.bucket.blob(self.prefix + check_name(name))
        options = {"if_generation_match": int(generation), **patience()}
        try:
            with translated(self._uri(name)):
                if isinstance(data, Path):
                    blob.upload_from_filename(data, **options)
                else:
                    blob.upload_from_string(data, content_type="application/octet-stream", **options)
        except Overtaken:
            return False
        return True

    def _blob_if_there(self, name: str) -> Any:
        with translated(self._uri(name)):
            return self.bucket.get_blob(self.prefix + check_name(name), **patience())

    def _blob(self, name: str) -> Any:
        blob = self._blob_if_there(name)
        if blob is None:
            raise InputMissing(f"{self._uri(name)} does not exist; check the bucket and the name")
        return blob

    def _uri(self, name: str) -> str:
        return f"{self.uri}/{name}"


class Overtaken(TransferError):
    """Precondition failed: the object changed meanwhile."""


def connect() -> Any:
    try:
        return storage.Client(project="none")  # objects need no project; without one the SDK refuses to start
    except auth.DefaultCredentialsError as e:
        if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise ConfigError(f"GOOGLE_APPLICATION_CREDENTIALS cannot be used: {e}") from e
        log.info("gs: no default credentials found, going on without any")
        return storage.Client.create_anonymous_client()


def patience() -> dict[str, Any]:
    return {"timeout": TIMEOUT_SECONDS, "retry": DEFAULT_RETRY.with_timeout(DEADLINE_SECONDS)}


def same(blob: Any) -> dict[str, int]:
    """The generation that was looked up, not one written since."""
    return {"if_generation_match": blob.generation}


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """The SDK's errors as ours, each naming the object."""
    try:
        yield
    except DataCorruption as e:
        raise TransferError(f"{uri} arrived with a wrong checksum; try again") from e
    except api.GoogleAPICallError as e:
        kind, cure = verdict(e.code or 0)
        raise kind(f"{uri}: {e.code} {first_line(e.message)}; {cure}") from e
    except auth.RefreshError as e:
        if e.retryable:
            raise ServiceUnavailable(f"{uri}: credentials cannot be refreshed now: {first_line(e)}; try later") from e
        raise NotAllowed(f"{uri}: credentials are refused: {first_line(e)}; log in anew") from e
    except UNREACHABLE as e:
        reason = first_line(e.cause if isinstance(e, api.RetryError) else e)
        raise ServiceUnavailable(
            f"{uri} did not answer within {DEADLINE_SECONDS:g} s: {reason}; check the network or try later"
        ) from e


def verdict(code: int) -> tuple[type[QuotesmithError], str]:
    if code in (401, 403):
        return NotAllowed, "give this job's account the right to read, create and delete objects there"
    if code == 404:
        return InputMissing, "check the bucket and the name"
    if code == 412:
        return Overtaken, "it changed meanwhile; try again"
    if code in BUSY or code >= 500:
        return ServiceUnavailable, "try later"
    return ConfigError, "the server refuses the request; check the bucket and the name"


def first_line(message: object) -> str:
    return str(message).strip().split("\n")[0][:300]
