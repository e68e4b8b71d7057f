"""Google Cloud Storage, with default credentials or, where there are none, anonymously. Every write names the
generation it replaces, so that a retried write cannot undo somebody else's."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import requests
import urllib3
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY

from pipeline import retrying
from pipeline.bucket import NO_ANSWER, Body, BucketStore, Page, Report, first_line, no_bucket, verdict
from pipeline.errors import ConfigError, InputMissing, NotAllowed, ServiceUnavailable, TransferError
from pipeline.progress import Watched
from pipeline.retrying import Deadline
from pipeline.storage import Stat

log = logging.getLogger(__name__)

UNREACHABLE = (
    api.RetryError,
    auth.GoogleAuthError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    ConnectionError,
)


def open_store(uri: str) -> BucketStore:
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    if not bucket:
        raise ConfigError(f"{uri} names no bucket; write gs://bucket/prefix")
    return BucketStore(GsRequests(bucket, prefix.strip("/")))


class GsRequests:
    """`bucket.Requests`."""

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

    def head(self, name: str) -> Stat | None:
        with self._translated(name):
            blob = self.bucket.get_blob(self.prefix + name, **once())
            return blob and Stat(blob.size, str(blob.generation), blob.md5_hash, blob.crc32c)

    def fetch(self, name: str, found: Stat, start: int, take: Callable[[bytes], object]) -> None:
        with self._translated(name):
            self._blob(name).download_to_file(
                Taker(take),
                start=start or None,
                raw_download=True,  # a stored .gz arrives as stored
                checksum=None,  # `bucket.Arrival` checks the whole, over all tries
                if_generation_match=int(found.version),
                **once(),
            )

    def send(self, name: str, data: Body, expected: str | None, deadline: Deadline, report: Report) -> bool:
        with self._translated(name), Watched(data, report) as file:
            try:
                self._blob(name, chunk_size=retrying.PIECE_BYTES).upload_from_file(
                    file,
                    size=file.size,
                    content_type="application/octet-stream",
                    if_generation_match=int(expected or 0),
                    timeout=(piece_seconds(), retrying.read_seconds()),
                    retry=DEFAULT_RETRY.with_timeout(max(0.01, deadline.left()))
                    if file.size > retrying.PIECE_BYTES
                    else None,
                )
            except api.PreconditionFailed:
                return False
            except api.GoogleAPICallError as e:
                if e.code not in (404, 410) or getattr(getattr(e.response, "request", None), "method", "") != "PUT":
                    raise
                # Pieces go by PUT, to a session that the server can lose; the bucket is looked for by the POST before.
                raise ServiceUnavailable(f"{self.uri}/{name}: the server lost the upload midway; try again") from e
        return True

    def page(self, prefix: str, token: str | None, limit: int) -> Page:
        with self._translated(prefix):
            blobs = self.bucket.client.list_blobs(
                self.bucket,
                prefix=self.prefix + prefix,
                fields="items(name,size),nextPageToken",
                page_token=token,
                page_size=limit,
                **once(),
            )
            found = [(blob.name.removeprefix(self.prefix), blob.size) for blob in next(blobs.pages, ())]
            return found, blobs.next_page_token

    def remove(self, name: str, version: str) -> None:
        try:
            with self._translated(name):
                self._blob(name).delete(if_generation_match=int(version), **once())
        except InputMissing:
            log.debug("gs: %s/%s is gone already", self.uri, name)

    def _blob(self, name: str, **options: Any) -> Any:
        return self.bucket.blob(self.prefix + name, **options)

    def _translated(self, name: str) -> Any:
        return translated(f"{self.uri}/{name}")


class Taker:
    """What the SDK writes a download to."""

    def __init__(self, take: Callable[[bytes], object]) -> None:
        self.write = take


def connect() -> Any:
    # Else the SDK looks up the bucket itself, for traces that nobody reads and with a right this job may lack.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    try:
        return storage.Client(project="none")  # objects need no project; without one the SDK refuses to start
    except auth.DefaultCredentialsError as e:
        if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise ConfigError(f"GOOGLE_APPLICATION_CREDENTIALS cannot be used: {first_line(e)}") from e
        log.info("gs: no default credentials found, going on without any")
        return storage.Client.create_anonymous_client()
    except (OSError, *NO_ANSWER) as e:
        raise ConfigError(f"gs: the file of credentials cannot be used: {first_line(e)}; make it anew") from e


def once() -> dict[str, Any]:
    """One try: `retrying` makes the others."""
    return {"timeout": (retrying.connect_seconds(), retrying.read_seconds()), "retry": None}


def piece_seconds() -> float:
    """A piece goes out in one call to the socket, for which the SDK has only the time to connect."""
    return retrying.connect_seconds() + retrying.PIECE_BYTES / retrying.SLOWEST_BYTES_PER_SECOND


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """The SDK's errors as ours, each naming the object."""
    try:
        yield
    except DataCorruption as e:
        raise TransferError(f"{uri} arrived with a wrong checksum; try again") from e
    except api.GoogleAPICallError as e:
        if (e.code or 0) in range(200, 300):
            raise no_bucket(uri, e) from e
        kind, cure = verdict(e.code or 0)
        raise kind(f"{uri}: {e.code} {first_line(e.message)}; {cure}") from e
    except auth.RefreshError as e:
        if e.retryable:
            raise ServiceUnavailable(f"{uri}: credentials cannot be refreshed now: {first_line(e)}; try later") from e
        raise NotAllowed(f"{uri}: credentials are refused: {first_line(e)}; log in anew") from e
    except UNREACHABLE as e:
        reason = first_line(e.cause if isinstance(e, api.RetryError) else e)
        raise ServiceUnavailable(f"{uri} does not answer: {reason}; check the network or try later") from e
    except NO_ANSWER as e:
        raise no_bucket(uri, e) from e
    except OSError as e:
        if e.errno is not None:  # of the disk
            raise
        raise ConfigError(f"{uri}: {first_line(e)}; check REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE") from e
