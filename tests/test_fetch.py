from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import fetch as module
from pipeline.artifacts import Corpus, sha256_of
from pipeline.config import DataConfig
from pipeline.errors import DataError, TryLater
from pipeline.fetch import fetch
from pipeline.inputs import content_hash, resolve
from pipeline.quotes import fold, read_quotes
from pipeline.storage import open_store
from tests.places import BOTH, Place


def read(inputs, cfg, *, out):
    return fetch(resolve(inputs, cfg), cfg, out=out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "stage").mkdir()
    return tmp_path / "stage"


def texts(corpus: Corpus) -> list[str]:
    return [json.loads(line)["text"] for line in corpus.path.read_text(encoding="utf-8").split("\n")[:-1]]


def names(corpus: Corpus) -> list[str]:
    return [source.name for source in corpus.sources]


def test_the_default_files_of_a_folder_become_a_corpus(place: Place, out: Path) -> None:
    uri = place.fill({**BOTH, "zzz.txt": "not asked for"})
    corpus = read((uri,), DataConfig(), out=out)
    assert texts(corpus) == ["First one", "Second", "Third", "fourth!"]
    assert names(corpus) == ["kanye-quotes.txt", "trump-quotes.txt"]
    rows = [json.loads(line) for line in corpus.path.read_text().splitlines()]
    assert all(row["key"] == fold(row["text"]) for row in rows)
    assert rows[2] == {"text": "Third", "source": "trump-quotes.txt", "key": "third"}
    assert corpus.sha256 == sha256_of(corpus.path)
    assert [path.name for path in out.iterdir()] == ["quotes.jsonl"]
    first = corpus.sources[0]
    assert (first.uri, first.found, first.blank, first.kept) == (f"{uri}/kanye-quotes.txt", 2, 1, 2)
    assert first.size_bytes == len(BOTH["kanye-quotes.txt"].encode())


def test_a_folder_and_a_bucket_give_the_same_corpus(tmp_path: Path, gcs_bucket_uri: str) -> None:
    found = []
    for number, uri in enumerate((str(tmp_path / "in"), f"{gcs_bucket_uri}/in/")):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(read((Place(uri).fill(BOTH),), DataConfig(), out=folder))
    assert found[0].sha256 == found[1].sha256
    assert [source.sha256 for source in found[0].sources] == [source.sha256 for source in found[1].sources]


def test_duplicates_are_dropped_across_files_and_counted(place: Place, out: Path) -> None:
    uri = place.fill({"a.txt": '“Same”\nsame!\n"Same"\n...\nother\n', "b.txt": "SAME\nOther\nnew\nnew\n"})
    corpus = read((uri,), DataConfig(), out=out)
    assert texts(corpus) == ["Same", "other", "new"]
    a, b = corpus.sources
    assert (a.found, a.blank, a.exact_duplicates, a.near_duplicates, a.kept) == (4, 1, 1, 1, 2)
    assert (b.found, b.blank, b.exact_duplicates, b.near_duplicates, b.kept) == (4, 0, 1, 2, 1)
    assert corpus.quotes == 3


def test_inputs_are_read_in_the_given_order(place: Place, out: Path) -> None:
    uri = place.fill({"b.txt": "b", "a.txt": "a", "sub/c.txt": "c", "sub/d.jsonl": '{"text": "d"}'})
    inputs = (f"{uri}/b.txt", f"{uri}/sub/", f"{uri}/[a]*.txt")
    assert texts(read(inputs, DataConfig(), out=out)) == ["b", "c", "d", "a"]


def test_an_empty_file_or_one_of_blanks_is_bad_data_and_named(place: Place, out: Path) -> None:
    uri = place.fill({"empty.txt": "", "blank.txt": "\n \n...\n"})
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        read((f"{uri}/empty.txt",), DataConfig(), out=out)
    with pytest.raises(DataError, match=r"blank\.txt holds no quote, only 3 blank lines"):
        read((f"{uri}/blank.txt",), DataConfig(), out=out)
    assert not (out / "download").exists()


def test_a_file_named_twice_is_read_once_and_logged(place: Place, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = place.fill({"a.txt": "a\n"})
    with caplog.at_level(logging.WARNING):
        corpus = read((f"{uri}/a.txt", uri, f"{uri}/*.txt"), DataConfig(), out=out)
    assert names(corpus) == ["a.txt"] and corpus.sources[0].exact_duplicates == 0
    assert caplog.text.count("named twice and read once") == 2


def test_files_of_one_name_stay_apart(place: Place, out: Path) -> None:
    uri = place.fill({"x/q.txt": "one", "y/q.txt": "two"})
    assert names(read((f"{uri}/x", f"{uri}/y"), DataConfig(), out=out)) == ["q.txt", "q.txt (2)"]


def test_gzip_jsonl_and_a_utf8_mark_come_through_a_bucket(gcs_bucket_uri: str, out: Path) -> None:
    store = open_store(gcs_bucket_uri)
    store.put_if_absent("a.jsonl.gz", gzip.compress(b'{"text": "packed"}\n'))
    store.put_if_absent("b.txt", b"\xef\xbb\xbf\xe2\x80\x9cmarked\xe2\x80\x9d\r\n")
    assert texts(read((gcs_bucket_uri,), DataConfig(), out=out)) == ["packed", "marked"]


def test_no_input_means_the_sample(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        corpus = read((), DataConfig(), out=out)
    assert "embedded sample" in caplog.text
    assert [source.kept for source in corpus.sources] == [source.found for source in corpus.sources]
    assert names(corpus) == ["lighthouse-keeper.txt", "market-grandmother.txt"]
    assert [source.kept for source in corpus.sources] == [160, 160]
    lengths = [len(text.split()) for text in texts(corpus)]
    assert min(lengths) >= 5 and max(lengths) <= 40
    assert not any(text[0] in '"“' for text in texts(corpus))


def test_a_link_is_read_by_its_own_name(tmp_path: Path, out: Path) -> None:
    (tmp_path / "blob").write_text('{"text": "linked"}')
    (tmp_path / "q.jsonl").symlink_to(tmp_path / "blob")
    assert texts(read((str(tmp_path / "q.jsonl"),), DataConfig(), out=out)) == ["linked"]


def test_a_file_over_the_limit_is_refused_before_it_is_read(place: Place, out: Path) -> None:
    uri = place.fill({"a.txt": "x" * 2000})
    with pytest.raises(DataError, match=r"a\.txt has 2000 bytes"):
        read((uri,), DataConfig(max_file_bytes=1000), out=out)


@pytest.mark.parametrize("moment", ["before", "while"])
@pytest.mark.parametrize("content", [b"Another one\n", b"Longer than what was there before\n", b"\xff\xff\n"])
def test_an_input_that_changes_after_it_was_hashed_is_not_read_under_that_name(
    place: Place, out: Path, tmp_path: Path, content: bytes, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = place.fill({"a.txt": "First quote\n"})
    (tmp_path / "new").write_bytes(content)
    inputs = resolve((uri,), DataConfig(files=("a.txt",)))
    content_hash(inputs)

    def change_and_read(*of: Any) -> Iterator[str]:
        open_store(uri).put("a.txt", tmp_path / "new")
        return read_quotes(*of)

    if moment == "before":
        open_store(uri).put("a.txt", tmp_path / "new")
    else:
        monkeypatch.setattr(module, "read_quotes", change_and_read)
    with pytest.raises(TryLater, match=r"a\.txt changed while it was read; run again") as caught:
        fetch(inputs, DataConfig(), out=out)
    assert caught.value.exit_code == 75
