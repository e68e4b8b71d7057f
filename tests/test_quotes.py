from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from pipeline.config import DataConfig
from pipeline.errors import DataError
from pipeline.marks import strip_marks
from pipeline.quotes import CHUNK_BYTES, fold, read_quotes

hostile_text = pytest.mark.fault(
    "hostile files and names",
    "texts that are binary, in other encodings, broken or swollen gzip, broken JSON, one endless line",
    "refused in one sentence",
)

DEFAULTS = DataConfig()


def quotes(path: Path, content: bytes, name: str = "q.txt", cfg: DataConfig = DEFAULTS) -> list[str]:
    path = path / "file"
    path.write_bytes(content)
    return list(read_quotes(path, name, cfg))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_the_utf8_mark_leave_no_trace(tmp_path: Path, end: str, bom: bytes, last: bool) -> None:
    text = end.join(["“Ünë”", "", '"two"', "three"]) + end * last
    assert quotes(tmp_path, bom + text.encode()) == ["Ünë", "", "two", "three"]


def test_lines_that_straddle_read_chunks_stay_whole(tmp_path: Path) -> None:
    line = "x" * 99 + "é"
    content = "\r\n".join([line] * 30_000).encode()
    assert len(content) > 2 * CHUNK_BYTES
    assert quotes(tmp_path, content) == [line] * 30_000


def test_a_crlf_cut_in_two_by_a_chunk_is_one_line_end(tmp_path: Path) -> None:
    first = b"x" * (CHUNK_BYTES - 1)
    got = quotes(tmp_path, first + b"\r\nsecond", cfg=DataConfig(max_quote_bytes=CHUNK_BYTES))
    assert got == [first.decode(), "second"]


def test_gzip_is_recognized_by_its_first_bytes(tmp_path: Path) -> None:
    assert quotes(tmp_path, gzip.compress(b"one\ntwo\n"), "plain.txt") == ["one", "two"]


@hostile_text
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:12] + b"\xff" * 20])
def test_broken_gzip_is_bad_data(tmp_path: Path, damage: object) -> None:
    with pytest.raises(DataError, match=r"q\.txt is a broken gzip file"):
        quotes(tmp_path, damage(gzip.compress(b"a quote that is long enough\n" * 9)))  # type: ignore[operator]


@hostile_text
def test_bytes_that_are_not_utf8_are_named_by_line_and_offset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"q\.txt, line 2, byte 6: byte 0xe9 is not UTF-8"):
        quotes(tmp_path, b"one\nca\xe9\n")
    with pytest.raises(DataError, match=r"line 2, byte 9: "):
        quotes(tmp_path, b"\xef\xbb\xbfone\nca\xe9\n")
    with pytest.raises(DataError, match=r"line 3, byte 9: "):
        quotes(tmp_path, b"one\r\ntwo\r\xe9", cfg=DataConfig(unit="line"))


@hostile_text
def test_a_binary_file_is_refused_at_its_zero_byte(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2, byte 7: found a zero byte"):
        quotes(tmp_path, b"text\nab\0cd\n")


@hostile_text
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_unicode_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    start = b"\xfe\xff" if encoding == "utf-16-be" else b""
    with pytest.raises(DataError, match=f"is {encoding[:6].upper()} text"):
        quotes(tmp_path, start + "quote".encode(encoding))


@hostile_text
@pytest.mark.parametrize("packed", [False, True])
def test_a_line_of_50_megabytes_is_refused_without_reading_it_whole(tmp_path: Path, packed: bool) -> None:
    content = b"fine\n" + b"x" * 50_000_000
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"big\.txt, line 2: a line is longer than 1000000 bytes"):
        list(read_quotes(path, "big.txt", DEFAULTS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


@hostile_text
def test_a_gzip_that_grows_as_no_text_does_is_refused_long_before_its_end(tmp_path: Path) -> None:
    line = b"a" * 100_000 + b"\n"
    with pytest.raises(DataError, match=r"q\.txt grows to more than 200 times its size .* no text") as caught:
        quotes(tmp_path, gzip.compress(line * 680))
    assert caught.value.exit_code == 65 and "\n" not in str(caught.value)
    assert len(quotes(tmp_path, gzip.compress(line * 600))) == 600  # too small to be worth a suspicion
    assert len(quotes(tmp_path, line * 680)) == 680


@hostile_text
def test_a_gzip_bomb_of_short_lines_stops_at_the_limit(tmp_path: Path) -> None:
    bomb = gzip.compress(b"a quote\n" * 1_000_000)
    with pytest.raises(DataError, match="larger than 100000 bytes after decompression"):
        quotes(tmp_path, bomb, cfg=DataConfig(max_file_bytes=100_000))


def test_the_longest_allowed_line_passes(tmp_path: Path) -> None:
    cfg = DataConfig(max_quote_bytes=100)
    assert quotes(tmp_path, b"x" * 100 + b"\r\n" + b"y" * 100, cfg=cfg) == ["x" * 100, "y" * 100]
    with pytest.raises(DataError, match="line 2"):
        quotes(tmp_path, b"x" * 100 + b"\n" + b"y" * 101, cfg=cfg)


PARAGRAPHS = b"one\n  one more\n\n\ntwo\ntwo more\r\n\nthree"


def test_paragraphs_are_found_and_joined_with_single_spaces(tmp_path: Path) -> None:
    assert quotes(tmp_path, PARAGRAPHS) == ["one one more", "", "", "two two more", "", "three"]


def test_single_lines_with_blank_lines_between_stay_lines(tmp_path: Path) -> None:
    assert quotes(tmp_path, b"one\n\ntwo\n\nthree\n") == ["one", "", "two", "", "three"]
    assert quotes(tmp_path, b"one\ntwo\nthree\n\n") == ["one", "two", "three", ""]


def test_a_stray_blank_line_does_not_turn_a_list_into_paragraphs(tmp_path: Path) -> None:
    assert quotes(tmp_path, "“One”\nTwo.\n\nThree!\nfour\n".encode()) == ["One", "Two.", "", "Three!", "four"]


def test_the_unit_can_be_forced(tmp_path: Path) -> None:
    assert quotes(tmp_path, b"a\nb\n", cfg=DataConfig(unit="paragraph")) == ["a b"]
    assert quotes(tmp_path, PARAGRAPHS, cfg=DataConfig(unit="line"))[:2] == ["one", "one more"]


def test_a_paragraph_has_the_same_limit_as_a_line(tmp_path: Path) -> None:
    cfg = DataConfig(unit="paragraph", max_quote_bytes=100)
    assert quotes(tmp_path, b"x" * 49 + b"\n" + b"y" * 50, cfg=cfg) == ["x" * 49 + " " + "y" * 50]
    with pytest.raises(DataError, match="line 2: a paragraph is longer than 100 bytes"):
        quotes(tmp_path, b"x" * 50 + b"\n" + b"y" * 50, cfg=cfg)


def test_jsonl_gives_its_text_field(tmp_path: Path) -> None:
    rows = [{"text": "“one”"}, {"text": "two\nlines", "n": 1}, {"text": "  "}]
    content = "\n\n".join(json.dumps(row) for row in rows).encode()
    assert quotes(tmp_path, content, "q.jsonl") == ["one", "", "two lines", "", ""]
    assert quotes(tmp_path, gzip.compress(content), "gs://b/q.JSONL.gz")[0] == "one"
    assert quotes(tmp_path, b'{"quote": "x"}', "q.jsonl", DataConfig(text_field="quote")) == ["x"]


@hostile_text
@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{broken", "is not valid JSON .*; needed one JSON object a line, with 'text'"),
        ("[" * 100_000, "is not valid JSON .*; needed one JSON object a line, with 'text'"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON .*; needed one JSON object a line, with 'text'"),
        ('["text"]', "holds a list; needed one JSON object a line"),
        ('{"quote": "x"}', "no text in 'text' but the fields quote"),
        ('{"text": 5}', "no text in 'text'"),
        ("{}", "the fields none"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_broken_jsonl_is_named_by_file_and_line(tmp_path: Path, line: str, why: str) -> None:
    with pytest.raises(DataError, match=rf"q\.jsonl, line 2:? .*{why}"):
        quotes(tmp_path, f'{{"text": "fine"}}\n{line}\n'.encode(), "q.jsonl")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ('"straight"', "straight"),
        ("“curly”", "curly"),
        ("‘single’", "single"),
        ("'single'", "single"),
        ("„low“", "low"),
        ("« angle »", "angle"),
        ('“mixed"', "mixed"),
        ("“‘Would you?’ I always say, ‘No.’”", "‘Would you?’ I always say, ‘No.’"),
        ("‘I don’t know’", "I don’t know"),
        ('"I said "no""', 'I said "no"'),
        ('"say "a" twice"', 'say "a" twice'),
        ('""yes" he said"', '"yes" he said'),
        ('"“twice wrapped”"', "twice wrapped"),
        ('"lost its partner', "lost its partner"),
        ("lost its partner”", "lost its partner"),
        ('"a" and "b"', '"a" and "b"'),
        ("“a” and “b”", "“a” and “b”"),
        ('"Yes," he said, "no."', '"Yes," he said, "no."'),
        ("'Tis true", "'Tis true"),
        ("the dogs'", "the dogs'"),
        ("he is 6'2\"", "he is 6'2\""),
        ('he said "no"', 'he said "no"'),
        ('"', ""),
        ("", ""),
    ],
)
def test_only_marks_round_the_whole_quote_are_stripped(given: str, kept: str) -> None:
    assert strip_marks(given) == kept
    assert strip_marks(kept) == kept


def test_folding_forgets_case_marks_and_spacing() -> None:
    assert fold("  Don’t   STOP—ever!\tﬁne Ⅳ") == fold("dont stopever fine iv") == "dont stopever fine iv"
    assert fold("Straße") == fold("STRASSE")
    assert fold("zero\u200bwidth") == "zerowidth"
    assert fold("e\u0301te\u0301") == fold("ÉTÉ")
    assert fold("you can't") != fold("you can")


@pytest.mark.parametrize("text", ["...", "“”", "🔥🔥", "\u200b", " \t ", "—"])
def test_a_text_without_letters_or_digits_is_blank(tmp_path: Path, text: str) -> None:
    assert fold(text) == ""
    assert quotes(tmp_path, f"{text}\nquote".encode()) == ["", "quote"]


def test_control_characters_inside_a_quote_become_a_space(tmp_path: Path) -> None:
    assert quotes(tmp_path, "a \x0b b\u2028c\x1a\n".encode()) == ["a b c"]


@pytest.mark.parametrize("name", ["q.jsonl", "q.ndjson", "q.JSON", "q.ndjson.gz"])
def test_json_lines_go_by_several_names(tmp_path: Path, name: str) -> None:
    assert quotes(tmp_path, b'{"text": "one"}\n{"text": "two"}\n', name) == ["one", "two"]


def test_a_json_array_is_refused_and_not_read_as_prose(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"q\.json, line 1"):
        quotes(tmp_path, b'["one", "two"]', "q.json")
