"""Amazon S3 and what speaks its protocol (AWS_ENDPOINT_URL), with the credentials boto3 finds or, where there are
none, unsigned. Every write names the ETag it replaces; every byte travels under a CRC-32C that the server checks.

Preconditions: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
Checksums of whole objects in parts: https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

from __future__ import annotations

import base64
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import urllib3

from pipeline import retrying
from pipeline.bucket import NO_ANSWER, Body, BucketStore, Overtaken, Page, Report, first_line, no_bucket, verdict
from pipeline.errors import (
    ConfigError,
    InputMissing,
    NotAllowed,
    QuotesmithError,
    ServiceUnavailable,
    TransferError,
    TryLater,
)
from pipeline.progress import Watched
from pipeline.retrying import Deadline
from pipeline.storage import CHUNK_BYTES, Crc32c, Stat, crc32c_of

try:
    import boto3
    from botocore import UNSIGNED
    from botocore import exceptions as api
    from botocore.config import Config
    from botocore.parsers import ResponseParserError
except ModuleNotFoundError as e:
    raise ConfigError(f"s3:// needs {e.name}, which is not installed; pip install 'quotesmith[s3]'") from e

log = logging.getLogger(__name__)

MOST_PARTS = 10_000
PLAIN_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
CUSTOM_ENDPOINT = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
# Codes whose HTTP status says something else than they do.
KINDS: dict[str, type[QuotesmithError]] = {
    "RequestTimeout": ServiceUnavailable,  # 400
    "BadDigest": TransferError,  # 400, as the next three
    "InvalidDigest": TransferError,
    "XAmzContentSHA256Mismatch": TransferError,
    "XAmzContentChecksumMismatch": TransferError,
    "ExpiredToken": NotAllowed,  # 400, as the next
    "InvalidToken": NotAllowed,
    "NoSuchUpload": TryLater,  # 404: done or swept away already; the next try starts anew
}


def open_store(uri: str) -> BucketStore:
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    if not bucket:
        raise ConfigError(f"{uri} names no bucket; write s3://bucket/prefix")
    return BucketStore(S3Requests(bucket, prefix.strip("/")))


class S3Requests:
    """`bucket.Requests`."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    @cached_property
    def client(self) -> Any:
        return connect()

    def head(self, name: str) -> Stat | None:
        try:
            with self._translated(name):
                found = self.client.head_object(**self._key(name), ChecksumMode="ENABLED")
                return Stat(found["ContentLength"], found["ETag"], md5_from(found), crc32c_from(found))
        except InputMissing:
            return None

    def fetch(self, name: str, found: Stat, start: int, take: Callable[[bytes], object]) -> None:
        pinned = {"IfMatch": found.version} | ({"Range": f"bytes={start}-"} if start else {})
        with self._translated(name):
            body = self.client.get_object(**self._key(name), **pinned, ChecksumMode="ENABLED")["Body"]
            with body:
                for chunk in body.iter_chunks(CHUNK_BYTES):
                    take(chunk)

    def send(self, name: str, data: Body, expected: str | None, deadline: Deadline, report: Report) -> bool:
        condition = {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
        try:
            if isinstance(data, Path) and data.stat().st_size > retrying.PIECE_BYTES:
                found = self.head(name)  # the condition itself is looked at only when all parts are there
                if (found.version if found else None) != expected:
                    return False
                self._send_parts(name, data, condition, deadline, report)
            else:
                self._send_whole(name, data, condition, report)
        except Overtaken:
            return False
        except InputMissing as e:  # If-Match, and the object is gone; a missing bucket is another matter
            if code_of(e.__cause__) != "NoSuchKey":
                raise
            return False
        return True

    def page(self, prefix: str, token: str | None, limit: int) -> Page:
        where = {"ContinuationToken": token} if token else {}
        with self._translated(prefix):
            page = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + prefix, MaxKeys=limit, **where)
            require(page, "IsTruncated")
            found = [(entry["Key"].removeprefix(self.prefix), entry["Size"]) for entry in page.get("Contents", ())]
            return found, page.get("NextContinuationToken")

    def remove(self, name: str, version: str) -> None:
        with self._translated(name), suppress(InputMissing):
            self.client.delete_object(**self._key(name))

    def _send_whole(self, name: str, data: Body, condition: dict[str, str], report: Report) -> None:
        sums = checksums(data)
        with self._translated(name):
            if isinstance(data, bytes):
                require(self.client.put_object(**self._key(name), **condition, **sums, Body=data), "ETag")
                return
            with Watched(data, report) as body:
                sent = self.client.put_object(
                    **self._key(name), **condition, **sums, Body=body, ContentLength=body.size
                )
                require(sent, "ETag")

    def _send_parts(self, name: str, path: Path, condition: dict[str, str], deadline: Deadline, report: Report) -> None:
        """In parts under one CRC-32C of the whole; they become the object only at the end, and all at once."""
        where, size, whole = f"{self.uri}/{name}", path.stat().st_size, {"ChecksumType": "FULL_OBJECT"}
        length = max(retrying.PIECE_BYTES, -(-size // MOST_PARTS))
        with self._translated(name), self._upload(name, whole) as target:

            def send_part(number: int) -> dict[str, Any]:
                start = (number - 1) * length
                sums = checksums(path, start, length)
                with translated(where), Watched(path, report, start, length) as body:
                    sent = self.client.upload_part(
                        **target, **sums, PartNumber=number, Body=body, ContentLength=body.size
                    )
                return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumCRC32C": sums["ChecksumCRC32C"]}

            parts = [
                retrying.retry(partial(send_part, number), deadline, where, retrying.try_seconds(length))
                for number in range(1, -(-size // length) + 1)
            ]
            self.client.complete_multipart_upload(
                **target, **condition, **whole, ChecksumCRC32C=crc32c_of(path), MultipartUpload={"Parts": parts}
            )

    @contextmanager
    def _upload(self, name: str, whole: dict[str, str]) -> Iterator[dict[str, str]]:
        """An upload in parts, given up on any error: parts that nobody completes cost money."""
        begun = self.client.create_multipart_upload(**self._key(name), **whole, ChecksumAlgorithm="CRC32C")
        target = self._key(name) | {"UploadId": begun["UploadId"]}
        try:
            yield target
        except BaseException:
            with suppress(api.BotoCoreError, api.ClientError):
                self.client.abort_multipart_upload(**target)
            raise

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + name}

    def _translated(self, name: str) -> Any:
        return translated(f"{self.uri}/{name}", signed=self.client.meta.config.signature_version is not UNSIGNED)


def connect() -> Any:
    """A client that tries once and is patient as `retrying` says; ConfigError for settings boto3 cannot use."""
    custom = any(os.environ.get(name) for name in CUSTOM_ENDPOINT)
    try:
        session = boto3.session.Session()
        signed = session.get_credentials() is not None
        if not signed:
            log.info("s3: no credentials found, going on without any")
        config = Config(
            connect_timeout=retrying.connect_seconds(),
            read_timeout=retrying.read_seconds(),
            retries={"mode": "standard", "total_max_attempts": 1},  # `retrying` makes the others
            # Few servers of one's own answer at bucket.host.
            s3={"addressing_style": "path" if custom else "auto"},
            **({} if signed else {"signature_version": UNSIGNED}),
        )
        client = session.client("s3", config=config)
        client.meta.events.register("before-send.s3", send_at_once)
        return client
    except api.CredentialRetrievalError as e:
        raise ServiceUnavailable(f"s3: credentials cannot be had now: {first_line(e)}; try later") from e
    except (api.BotoCoreError, ValueError) as e:
        raise ConfigError(f"s3: boto3 cannot use its settings: {first_line(e)}; check the AWS_… variables") from e


def send_at_once(request: Any, **_: object) -> None:
    """Not only when the server has said 100: if it ends the connection within that answer, botocore reads on for ever,
    at the cost of a core, in `AWSConnection._consume_headers` (1.44.5). The header is in no signature.
    """
    request.headers.pop("Expect", None)


def checksums(data: Body, start: int = 0, length: int | None = None) -> dict[str, str]:
    """What S3 is to compare the bytes with when they are there. boto3 itself knows CRC-32C only with awscrt."""
    checksum = Crc32c()
    with Watched(data, lambda _: None, start, length) as body:
        while chunk := body.read(CHUNK_BYTES):
            checksum.update(chunk)
    return {"ChecksumAlgorithm": "CRC32C", "ChecksumCRC32C": checksum.text()}


def require(answer: dict[str, Any], key: str) -> None:
    """KeyError without what every S3 says: boto3 takes any page with the status 200 for an answer."""
    answer[key]


def crc32c_from(found: dict[str, Any]) -> str | None:
    """The whole object's; not the checksum over its parts' checksums that some uploads leave."""
    checksum = found.get("ChecksumCRC32C")
    if not checksum or "-" in checksum or found.get("ChecksumType") == "COMPOSITE":
        return None
    return str(checksum)


def md5_from(found: dict[str, Any]) -> str | None:
    """The ETag, where it is one: not after an upload in parts, nor under a key of one's own."""
    plain = PLAIN_MD5.fullmatch(found["ETag"])
    if not plain or found.get("ServerSideEncryption") not in (None, "AES256") or found.get("SSECustomerAlgorithm"):
        return None
    return base64.b64encode(bytes.fromhex(plain[1])).decode()


@contextmanager
def translated(uri: str, *, signed: bool = True) -> Iterator[None]:
    """The SDK's errors as ours, each naming the object."""
    try:
        yield
    except api.ClientError as e:
        code = code_of(e)
        kind, cure = verdict(e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        kind = KINDS.get(code, kind)
        if kind is NotAllowed and not signed:
            cure = "no AWS credentials were found; set AWS_ACCESS_KEY_ID and its secret, or give the machine a role"
        raise kind(f"{uri}: {code} {first_line(e.response.get('Error', {}).get('Message', ''))}; {cure}") from e
    except api.FlexibleChecksumError as e:
        raise TransferError(f"{uri} arrived with a wrong checksum; try again") from e
    except api.ParamValidationError as e:
        raise ConfigError(f"{uri}: {first_line(e.kwargs['report'])}; choose another name") from e
    except (api.BotoCoreError, urllib3.exceptions.HTTPError, ConnectionError) as e:
        raise ServiceUnavailable(f"{uri} does not answer: {first_line(e)}; check the network or try later") from e
    except (ResponseParserError, *NO_ANSWER) as e:
        raise no_bucket(uri, e) from e


def code_of(error: object) -> str:
    """S3's own word for an error, as "NoSuchKey"; "" for other errors."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, api.ClientError) else ""
