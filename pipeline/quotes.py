"""The bytes of one file as quotes: decompressed, decoded, cut into lines or paragraphs, stripped of the marks
round them. Reading is bounded: neither a line without an end nor a gzip bomb fills the memory."""

from __future__ import annotations

import gzip
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.config import DataConfig
from pipeline.errors import DataError
from pipeline.json_object import json_object
from pipeline.marks import CLOSING, RIGHT, strip_marks

CHUNK_BYTES = 1024 * 1024
JSON_LINES = (".jsonl", ".ndjson", ".json")  # a .json that is one array is refused with its line, not read as prose
GZIP = b"\x1f\x8b"
# A gzip that has come to so many bytes must not have grown more than so many times: text shrinks to a tenth or so, and
# 8 MB that are 8 GiB of empty lines would take hours.
UNSUSPICIOUS_BYTES = 64 * 1024 * 1024
MOST_GROWTH = 200
BOM = b"\xef\xbb\xbf"
FOREIGN_BOMS = {  # the longer first: UTF-32's little-endian mark begins with UTF-16's
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
LINE_END = re.compile(rb"\r\n|\r|\n")
BREAK = re.compile(r"\s*[\x00-\x1f\x7f\x85\u2028\u2029]+\s*")  # also stray control characters

SENTENCE_ENDS = tuple(mark.encode() for mark in (".", "!", "?", "…", "'", RIGHT, *CLOSING))


@dataclass(frozen=True)
class Line:
    number: int  # from 1
    offset: int  # in bytes from the start of the file, after decompression
    data: bytes


def read_quotes(path: Path, name: str, cfg: DataConfig) -> Iterator[str]:
    """Every quote of the file in order, blank ones as "": a blank line counts as one.

    `name` decides the format (.jsonl, .ndjson or .json, also .gz, else text) and stands in messages. DataError
    names the file, the line and, for text that is not UTF-8, the byte.
    """

    def lines() -> Iterator[Line]:
        return read_lines(path, name, cfg)

    texts: Iterator[str]
    if name.lower().removesuffix(".gz").endswith(JSON_LINES):
        texts = (json_text(line, name, cfg.text_field) for line in lines())
    elif is_paragraphs(lines, cfg):
        texts = paragraphs(lines(), name, cfg.max_quote_bytes)
    else:
        texts = (decoded(line, name) for line in lines())
    for text in texts:
        quote = strip_marks(BREAK.sub(" ", text).strip())
        yield quote if fold(quote) else ""


def is_paragraphs(lines: Callable[[], Iterable[Line]], cfg: DataConfig) -> bool:
    """auto: blank lines part blocks of lines, and most lines that another one follows stop in mid-sentence.

    The second half keeps a stray blank line from turning a list of quotes into two huge paragraphs.
    """
    if cfg.unit != "auto":
        return cfg.unit == "paragraph"
    blocks = followed = run_on = 0
    previous = b""
    for line in lines():
        text = line.data.strip()
        blocks += bool(text) and not previous
        if text and previous:
            followed += 1
            run_on += not previous.endswith(SENTENCE_ENDS)
        previous = text
    return blocks > 1 and run_on * 2 > followed


def paragraphs(lines: Iterable[Line], name: str, max_bytes: int) -> Iterator[str]:
    """Lines up to a blank one, joined; each blank line as "", since it is counted."""
    parts: list[str] = []
    size = 0
    for line in lines:
        text = decoded(line, name)
        size = size + len(line.data) + 1 if text.strip() else 0
        if size > max_bytes + 1:
            raise too_long("paragraph", name, line.number, max_bytes)
        if size:
            parts.append(text)
            continue
        if parts:
            yield "\n".join(parts)
        parts = []
        yield ""
    if parts:
        yield "\n".join(parts)


def read_lines(path: Path, name: str, cfg: DataConfig) -> Iterator[Line]:
    """Lines without their ends (LF, CRLF or CR), none longer than `cfg.max_quote_bytes`."""
    number, offset, rest = 1, 0, b""
    for chunk in chunks(path, name, cfg.max_file_bytes):
        rest += chunk
        start = len(BOM) if number == 1 and offset == 0 and rest.startswith(BOM) else 0
        # A CR at the end of a chunk may be half of a CRLF: it stays for the next round.
        for end in LINE_END.finditer(rest, start, len(rest) - rest.endswith(b"\r")):
            yield checked(Line(number, offset + start, rest[start : end.start()]), name, cfg.max_quote_bytes)
            number, start = number + 1, end.end()
        rest, offset = rest[start:], offset + start
        checked(Line(number, offset, rest.removesuffix(b"\r")), name, cfg.max_quote_bytes)
    if rest:
        yield checked(Line(number, offset, rest.removesuffix(b"\r")), name, cfg.max_quote_bytes)


def chunks(path: Path, name: str, max_bytes: int) -> Iterator[bytes]:
    """The decompressed bytes."""
    total = 0
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
        try:
            while chunk := file.read(CHUNK_BYTES):
                if not total:
                    refuse_foreign(chunk, name)
                total += len(chunk)
                if total > max_bytes:
                    raise DataError(
                        f"{name} is larger than {max_bytes} bytes after decompression; split it or raise "
                        "data.max_file_bytes"
                    )
                if packed and total > max(UNSUSPICIOUS_BYTES, MOST_GROWTH * raw.tell()):
                    raise DataError(
                        f"{name} grows to more than {MOST_GROWTH} times its size when unpacked, which no text does; "
                        "look what it holds, or give it unpacked"
                    )
                yield chunk
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise DataError(f"{name} is a broken gzip file: {e}; upload it again") from e


def refuse_foreign(start: bytes, name: str) -> None:
    for mark, encoding in FOREIGN_BOMS.items():
        if start.startswith(mark):
            raise DataError(f"{name} is {encoding} text by its first bytes; convert it to UTF-8")


def checked(line: Line, name: str, max_bytes: int) -> Line:
    if len(line.data) > max_bytes:
        raise too_long("line", name, line.number, max_bytes)
    zero = line.data.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{name}, line {line.number}, byte {line.offset + zero}: found a zero byte, so this is a binary "
            "file; quotes must be UTF-8 text"
        )
    return line


def too_long(what: str, name: str, line: int, max_bytes: int) -> DataError:
    return DataError(
        f"{name}, line {line}: a {what} is longer than {max_bytes} bytes, which is no quote; "
        "put one quote on a line or raise data.max_quote_bytes"
    )


def decoded(line: Line, name: str) -> str:
    try:
        return line.data.decode()
    except UnicodeDecodeError as e:
        raise DataError(
            f"{name}, line {line.number}, byte {line.offset + e.start}: byte 0x{line.data[e.start]:02x} is not"
            " UTF-8; convert the file to UTF-8"
        ) from e


def json_text(line: Line, name: str, field: str) -> str:
    text = decoded(line, name)
    if not text.strip():
        return ""
    where = f"{name}, line {line.number}"
    record = json_object(text, where, DataError, f"one JSON object a line, with {field!r}")
    if not isinstance(record.get(field), str):
        raise DataError(
            f"{where}: the record has no text in {field!r} but the fields {', '.join(record) or 'none'}; "
            "set data.text_field"
        )
    return whole(cast(str, record[field]), where)


def whole(text: str, where: str) -> str:
    """JSON escapes can spell half of a surrogate pair, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{where}: the text has half of a surrogate pair at character {e.start}") from e
    return text


class Folding(dict[int, int | None]):
    """A table for str.translate that fills itself: punctuation, symbols, invisible characters are dropped."""

    def __missing__(self, code: int) -> int | None:
        char = chr(code)
        keep = char.isspace() or unicodedata.category(char)[0] not in "PSC"
        self[code] = code if keep else None
        return self[code]


FOLDING = Folding()


def fold(text: str) -> str:
    """What near-duplicates have in common: compatibility forms, case, punctuation and spacing do not count.

    "" for a text without a letter or digit, such as "..." or an emoji.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(FOLDING).split())
