"""Where inputs lie: a folder and a bucket, filled alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage import open_store

BOTH = {"kanye-quotes.txt": "“First one”\n\n“Second”\n", "trump-quotes.txt": "Third\r\nfourth!\r\n"}


class Place:
    """A folder or a gs:// prefix."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def fill(self, files: dict[str, str]) -> str:
        store = open_store(self.uri)
        for name, text in files.items():
            store.put_if_absent(name, text.encode())
        return self.uri


@pytest.fixture(params=["local", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(str(tmp_path / "in"))
    return Place(f"{request.getfixturevalue('gcs_bucket_uri')}/in")
