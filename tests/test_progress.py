from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline import progress
from pipeline.progress import Watched, transfer


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "pipeline.progress")
    return caplog


def test_a_large_transfer_ends_with_its_size_and_speed(lines: pytest.LogCaptureFixture) -> None:
    with transfer("download gs://b/x", 20_000_000) as report:
        report(20_000_000)
    assert len(lines.messages) == 1
    assert lines.messages[0].startswith("download gs://b/x: 20.0 MB in ") and lines.messages[0].endswith(" MB/s")


def test_a_small_or_needless_transfer_says_nothing(lines: pytest.LogCaptureFixture) -> None:
    with transfer("upload gs://b/x", 20_000) as report:
        report(20_000)
    with transfer("upload gs://b/there already", 20_000_000):
        pass
    assert lines.messages == []


def test_a_long_transfer_says_now_and_then_how_far_it_is(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOGGED_SECONDS", 0)
    with transfer("upload gs://b/x", 20_000_000) as report:
        report(5_000_000)
        report(2_000_000)  # a part is sent again
        report(20_000_000)
    assert [message.split(": ")[1].split(" in")[0] for message in lines.messages] == [
        "5.0 MB",
        "2.0 MB",
        "20.0 MB",
        "20.0 MB",
    ]
    assert lines.messages[0].endswith("of 20.0 MB")


def test_a_watched_file_is_read_as_it_is_and_tells_how_far(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    told: list[int] = []
    with Watched(tmp_path / "file", told.append) as file:
        assert (file.read(60), file.read(), file.read()) == (bytes(range(60)), bytes(range(60, 100)), b"")
        assert told == [60, 100, 100] and len(file) == file.size == 100
        assert file.seek(-10, 2) == 90 and file.read() == bytes(range(90, 100))
    assert file.closed


@pytest.mark.parametrize(("length", "size"), [(30, 30), (80, 60), (None, 60)])
def test_a_part_of_a_file_is_a_file_of_its_own(tmp_path: Path, length: int | None, size: int) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    told: list[int] = []
    with Watched(tmp_path / "file", told.append, start=40, length=length) as part:
        assert part.tell() == 0 and part.size == size
        assert part.read() == bytes(range(40, 40 + size))
        assert told == [40 + size]
        assert part.seek(0) == 0 and part.read(5) == bytes(range(40, 45))
