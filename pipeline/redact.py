"""Secrets out of what people and log collectors read: known by their shape, or because the environment holds them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

HIDDEN = "[secret]"
LONGEST_SENTENCE = 1000  # characters; SageMaker shows 1,024, Kubernetes keeps 4,096 bytes
SHORTEST = 8  # characters of an environment variable's value; "false" and "testing" are no secrets

QUERY = (
    "X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|X-Goog-Signature|X-Goog-Credential|X-Goog-Security-Token|"
    "Signature|sig|AWSAccessKeyId|GoogleAccessId|upload_id|(?:access_|id_|refresh_|session_|security_)?token|"
    "(?:api_?|access_|secret_)?key|client_secret|secret|password|code"
)
FIELD = (
    r"(?:access|api|auth|hf|hub|id|refresh|session|security)_?token|aws_?access_?key_?id|secret_?access_?key|secret_?key|"
    r"client_secret|private_key|api_?key|password|passwd|passphrase"
)
# What stays is the first group.
SHAPES = [
    re.compile(rf"([?&;](?:{QUERY})=)[^&;#\s\"'<>]+", re.I),
    re.compile(rf"(\b(?:aws_)?(?:{FIELD})[\"']?\s*[:=]\s*[\"']?)[^\s\"'&,}}]+", re.I),
    re.compile(r"(\b(?:Proxy-)?Authorization[\"']?\s*[:=]\s*[\"']?)[^\r\n\"']+", re.I),
    re.compile(r"(\bX-(?:Amz|Goog)-[\w-]*Token[\"']?\s*[:=]\s*[\"']?)[^\s\"'&,}]+", re.I),
    re.compile(r"(\bBearer\s+)(?=\S*[\d._~+/-])[\w.~+/=-]{16,}", re.I),
    re.compile(r"""([a-z][a-z0-9+.-]*://)[^/\s@"'<>]+@""", re.I),  # user:password@, or a token alone
    re.compile(r"()-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S),
    re.compile(r"()\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"),  # AWS
    re.compile(r"()\bya29\.[\w-]{16,}"),  # Google
    re.compile(r"()\bAIza[\w-]{30,}"),
    re.compile(r"()\bhf_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"()\b(?:gh[opsur]_|github_pat_|glpat-)[\w-]{16,}"),
    re.compile(r"()\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),  # JSON web token
]
SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|_KEY$", re.I
)
NO_SECRET_NAME = re.compile(r"_(FILE|PATH|DIR|URI|URL|SOCK|CREDENTIALS)$|^(QUOTESMITH|TOKENIZERS)_", re.I)


def redact(text: str) -> str:
    """`text` with every secret in it replaced."""
    for secret in of_environment():
        text = text.replace(secret, HIDDEN)
    for shape in SHAPES:
        text = shape.sub(rf"\g<1>{HIDDEN}", text)
    return text


def redacted(value: Any) -> Any:
    """`value` as JSON has it, every text in it, names of fields too, without secrets."""
    if isinstance(value, dict):
        return {redact(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def one_sentence(text: str) -> str:
    """`text` for whatever a platform shows of a failure: without secrets, in one line, at most `LONGEST_SENTENCE`."""
    return " ".join(redact(text).split())[:LONGEST_SENTENCE]


def of_environment() -> Iterator[str]:
    """Values of variables that are named like a secret, as they are and as they stand in a URL, the longest first."""
    values = {
        value.strip()
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and not NO_SECRET_NAME.search(name)
    }
    known = {form for value in values if len(value) >= SHORTEST for form in (value, quote(value, safe=""))}
    yield from sorted(known, key=len, reverse=True)
