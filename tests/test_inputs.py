from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config import DataConfig
from pipeline.errors import ConfigError, DataError, InputMissing, ServiceUnavailable
from pipeline.inputs import content_hash, resolve
from pipeline.storage import open_store
from tests.places import BOTH, Place


def test_a_glob_crosses_folders_only_when_told(place: Place) -> None:
    uri = place.fill({"a.txt": "a", "x/b.txt": "b", "x/y/c.txt": "c", "x/n.md": "n"})

    def found(pattern: str) -> list[str]:
        return [source.name for source in resolve((f"{uri}/{pattern}",), DataConfig())]

    assert found("*.txt") == ["a.txt"]
    assert found("*/*.txt") == ["b.txt"]
    assert found("**/*.txt") == ["a.txt", "b.txt", "c.txt"]
    assert found("?.txt") == ["a.txt"]
    with pytest.raises(InputMissing, match="matches no file"):
        found("*.csv")


def test_asked_file_names_and_globs_are_taken(place: Place) -> None:
    uri = place.fill({"a.txt": "a", "b.txt": "b", "x/c.txt": "c", "n.md": "n"})

    def found(*files: str) -> list[str]:
        return [source.name for source in resolve((uri,), DataConfig(files=files))]

    assert found("n.md", "a.txt") == ["n.md", "a.txt"]
    assert found("*.txt", "a.txt") == ["a.txt", "b.txt"]
    assert found("x/*.txt") == ["c.txt"]


def test_a_missing_default_file_is_named_and_not_skipped(place: Place) -> None:
    uri = place.fill({"kanye-quotes.txt": "x", "other.txt": "y"})
    with pytest.raises(InputMissing, match=r"lacks trump-quotes\.txt; it holds kanye-quotes\.txt, other\.txt"):
        resolve((uri,), DataConfig())


def test_a_missing_asked_file_is_named_with_what_is_there(place: Place) -> None:
    uri = place.fill({"a.txt": "x"})
    with pytest.raises(InputMissing, match=r"lacks b\.txt and \*\.csv; it holds a\.txt"):
        resolve((uri,), DataConfig(files=("a.txt", "b.txt", "*.csv")))


def test_without_default_files_every_text_file_is_taken(place: Place) -> None:
    uri = place.fill({"b.TXT": "b", "a.jsonl.gz": "", "c.txt.gz": "", "d.jsonl": "", "n.md": "", "x/e.txt": ""})
    got = [source.name for source in resolve((uri,), DataConfig())]
    assert got == ["a.jsonl.gz", "b.TXT", "c.txt.gz", "d.jsonl"]


@pytest.mark.parametrize("name", ["absent.txt", "absent/", "absent/*.txt", "only-notes"])
def test_what_does_not_exist_is_missing_input(place: Place, name: str) -> None:
    uri = place.fill({"a.txt": "x", "only-notes/n.md": "n"})
    with pytest.raises(InputMissing, match=r"absent|only-notes"):
        resolve((f"{uri}/{name}",), DataConfig())


def test_the_content_hash_follows_the_content(place: Place, tmp_path: Path) -> None:
    uri = place.fill(BOTH)
    before = content_hash(resolve((uri,), DataConfig()))
    assert content_hash(resolve((uri,), DataConfig())) == before
    (tmp_path / "new").write_bytes(b"Third\r\nfourth?\r\n")
    open_store(uri).put("trump-quotes.txt", tmp_path / "new")
    assert content_hash(resolve((uri,), DataConfig())) != before


def test_a_file_uri_and_a_link_name_the_same_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("quote")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.txt")
    found = resolve((f"file://{tmp_path}/a.txt", str(tmp_path / "link.jsonl")), DataConfig())
    assert [source.name for source in found] == ["a.txt"]


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        resolve((str(tmp_path / "pipe.txt"),), DataConfig())
    with pytest.raises(ConfigError, match="empty text"):
        resolve(("",), DataConfig())
    with pytest.raises(ConfigError, match="unknown scheme https://"):
        resolve(("https://host/a.txt",), DataConfig())


def test_a_missing_bucket_is_missing_input(gcs_bucket_uri: str) -> None:
    for uri in ("gs://no-such-bucket-here", "gs://no-such-bucket-here/a.txt"):
        with pytest.raises(InputMissing, match="no-such-bucket-here"):
            resolve((uri,), DataConfig())


def test_a_dead_endpoint_is_an_unavailable_service(dead_gcs: None) -> None:
    with pytest.raises(ServiceUnavailable, match=r"does not answer.* within 5 s"):
        resolve(("gs://bucket/a.txt",), DataConfig())


def test_a_file_name_that_is_not_utf8_is_refused_in_a_sentence(tmp_path):
    (tmp_path / os.fsdecode(b"a\xff.txt")).write_bytes(b"a quote")
    with pytest.raises(DataError, match="not UTF-8"):
        resolve((str(tmp_path),), DataConfig())


def test_a_file_name_with_a_control_character_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "a\x1b[2J.txt").write_text("a quote")
    with pytest.raises(DataError, match="control character") as caught:
        resolve((str(tmp_path),), DataConfig())
    assert str(caught.value).isprintable()
