"""The real SDKs and servers with a faulty network between them: the right bytes or the right error in time, and never
a part of a file under its final name."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline import retrying
from pipeline.checkpoints import Checkpoints
from pipeline.config import DataConfig, ResumeConfig
from pipeline.errors import ServiceUnavailable, TransferError
from pipeline.fetch import fetch
from pipeline.inputs import resolve
from pipeline.mirror import Mirror
from pipeline.publish import find_release, publish, verify
from pipeline.storage import Store, open_store
from tests.fault_proxy import Fault, FaultProxy, before

BUDGET_SECONDS = 4.8  # a hanging try ends after a third of it; the rest is for a busy machine
SHORT_SECONDS = 1.2  # for what ends only with the budget
SLACK_SECONDS = 6.0  # for a busy machine
CONTENT = os.urandom(3_000_000)
MANIFEST = b'{"objects": []}' * 20
FAULTS = {
    "reset before a response": Fault("reset"),
    "reset within the answer": Fault("reset", after=500),
    "cut within the answer": Fault("cut", after=70_000),
    "cut within the request": Fault("cut", "up", after=2000),
    "reset within the request": Fault("reset", "up", after=300_000),
    "responses swallowed": Fault("black hole"),
    "requests swallowed": Fault("black hole", "up"),
    "responses swallowed midway": Fault("black hole", after=100_000),
    "requests swallowed midway": Fault("black hole", "up", after=100_000),
    "responses dripping": Fault("drip"),
    "requests dripping": Fault("drip", "up"),
}


GROUP = "a faulty network before fake-gcs-server and moto"


class Network(NamedTuple):
    proxy: FaultProxy
    near: Store  # through the proxy
    far: Store  # past it


@pytest.fixture(params=["gs", "s3"])
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    monkeypatch.setattr(retrying, "BUDGET_SECONDS", BUDGET_SECONDS)
    monkeypatch.setattr(retrying, "SLOWEST_BYTES_PER_SECOND", 1e9)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_SECONDS", 0.01)
    uri = request.getfixturevalue({"gs": "gcs_bucket_uri", "s3": "s3_bucket_uri"}[request.param])
    variable = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}[request.param]
    far, near = open_store(uri), open_store(uri)
    assert far.stat("x") is None
    with before(os.environ[variable]) as proxy:
        monkeypatch.setenv(variable, proxy.url)
        assert near.stat("x") is None
        assert proxy.requests
        yield Network(proxy, near, far)


class Act(NamedTuple):
    """Something done to the object "x" and, for a download, the local file "to"."""

    prepare: Callable[[Store, Path], object]
    do: Callable[[Store, Path], object]
    succeeded: Callable[[Store, Path], bool]


def written(folder: Path, content: bytes) -> Path:
    (folder / "file").write_bytes(content)
    return folder / "file"


def holds(content: bytes) -> Callable[[Store, Path], bool]:
    return lambda store, folder: store.stat("x") is not None and store.read("x") == content


ACTS = {
    "get": Act(
        lambda store, folder: store.put("x", written(folder, CONTENT)),
        lambda store, folder: store.get("x", folder / "to" / "x"),
        lambda store, folder: (folder / "to" / "x").read_bytes() == CONTENT,
    ),
    "put": Act(
        lambda store, folder: store.put_if_absent("x", b"old"),
        lambda store, folder: store.put("x", written(folder, CONTENT)),
        holds(CONTENT),
    ),
    "put if absent": Act(
        lambda store, folder: None,
        lambda store, folder: store.put_if_absent("x", written(folder, CONTENT)),
        holds(CONTENT),
    ),
    "manifest": Act(
        lambda store, folder: None, lambda store, folder: store.put_if_absent("x", MANIFEST), holds(MANIFEST)
    ),
}


def assert_nothing_is_torn(act: str, network: Network, folder: Path) -> None:
    to = folder / "to"
    assert not to.exists() or [path.name for path in to.iterdir()] in ([], ["x"])
    assert not (to / "x").exists() or (to / "x").read_bytes() == CONTENT
    whole = {"get": (CONTENT,), "put": (b"old", CONTENT), "put if absent": (CONTENT,), "manifest": (MANIFEST,)}[act]
    assert network.far.stat("x") is None or network.far.read("x") in whole


@pytest.mark.fault(GROUP, "delays, cuts, resets, silence, dripping", "the right bytes in the end, no part of a file")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("act", ACTS)
def test_a_fault_that_passes_is_survived(network: Network, act: str, fault: str, tmp_path: Path) -> None:
    ACTS[act].prepare(network.far, tmp_path)
    network.proxy.fault = spoiling = replace(FAULTS[fault], times=1)
    answer = ACTS[act].do(network.near, tmp_path)
    has_data = spoiling.direction == ("down" if act == "get" else "up") and act != "manifest"
    assert network.proxy.spoilt == 1 or (spoiling.after and not has_data)
    assert answer in (None, True)
    assert ACTS[act].succeeded(network.far, tmp_path)
    assert_nothing_is_torn(act, network, tmp_path)


@pytest.mark.slow
@pytest.mark.fault(GROUP, "the same for good", "the right error in time, no part of a file")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("act", ACTS)
def test_a_fault_that_lasts_is_a_retryable_error_in_time(
    network: Network, act: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ACTS[act].prepare(network.far, tmp_path)
    network.proxy.fault = replace(FAULTS[fault])
    through = False
    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(retrying, "BUDGET_SECONDS", SHORT_SECONDS)
        try:
            ACTS[act].do(network.near, tmp_path)
            through = True  # what is shorter than the fault is
        except (ServiceUnavailable, TransferError) as e:
            assert "within" in str(e)
    # `put` looks up and writes under one budget, `get` and a comparison afterwards have one more.
    assert time.monotonic() - started < 2 * SHORT_SECONDS + SLACK_SECONDS
    assert not through or ACTS[act].succeeded(network.far, tmp_path)
    assert_nothing_is_torn(act, network, tmp_path)
    network.proxy.fault = None
    ACTS[act].do(network.near, tmp_path)
    assert ACTS[act].succeeded(network.far, tmp_path)


@pytest.mark.fault(GROUP, "delays, cuts, resets, silence, dripping", "the right bytes in the end, no part of a file")
@pytest.mark.parametrize("act", ACTS)
def test_a_slow_network_is_only_slow(network: Network, act: str, tmp_path: Path) -> None:
    ACTS[act].prepare(network.far, tmp_path)
    network.proxy.fault = Fault("latency", seconds=0.005)
    ACTS[act].do(network.near, tmp_path)
    assert ACTS[act].succeeded(network.far, tmp_path)


def test_a_download_gets_through_a_network_that_cuts_every_connection(network: Network, tmp_path: Path) -> None:
    ACTS["get"].prepare(network.far, tmp_path)
    network.proxy.fault = Fault("cut", after=1_200_000)
    ACTS["get"].do(network.near, tmp_path)
    assert ACTS["get"].succeeded(network.far, tmp_path)
    assert network.proxy.spoilt == 2


def test_an_upload_in_pieces_gets_through_a_network_that_cuts_some(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "PIECE_BYTES", 5 * 1024 * 1024)
    monkeypatch.setattr(retrying, "BUDGET_SECONDS", 20.0)  # the pauses of Google's SDK begin at a second
    content = os.urandom(12_000_000)
    network.proxy.fault = Fault("cut", "up", after=3_000_000, times=2)
    assert network.near.put_if_absent("x", written(tmp_path, content))
    assert network.far.read("x") == content
    assert network.proxy.spoilt


@pytest.mark.fault(GROUP, "while quotes are fetched", "the corpus is whole, or there is none")
@pytest.mark.parametrize("kind", ["cut", "reset", "black hole", "drip"])
def test_quotes_are_fetched_whole_or_not_at_all(
    network: Network, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"This is quote number {number}, and nobody said it.\n" for number in range(3000)]
    network.far.put_if_absent("in/kanye-quotes.txt", "".join(lines[:1500]).encode())
    network.far.put_if_absent("in/trump-quotes.txt", "".join(lines[1500:]).encode())
    for after, times in ((0, 1), (3000, 1), (3000, 10**6)):
        monkeypatch.setattr(retrying, "BUDGET_SECONDS", BUDGET_SECONDS if times == 1 else SHORT_SECONDS)
        network.proxy.fault = Fault(kind, after=after, times=times)
        folder = tmp_path / f"{after}-{times}"
        folder.mkdir()
        try:
            inputs = resolve((f"{network.near.uri}/in/",), DataConfig())
            corpus = fetch(inputs, DataConfig(), out=folder)
        except (ServiceUnavailable, TransferError):
            assert times > 1
            assert not (folder / "download").exists()
        else:
            assert times == 1 and corpus.quotes == 3000


@pytest.mark.fault(GROUP, "while a release is published", "the release is whole, or there is none")
@pytest.mark.parametrize("kind", ["cut", "reset", "black hole"])
def test_a_release_through_a_network_that_keeps_failing_is_whole_or_absent(
    network: Network, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"voice-Q2_K.gguf": written(tmp_path, CONTENT[:300_000])}
    output = f"{network.near.uri}/out"
    for spoilt in range(4):
        monkeypatch.setattr(retrying, "BUDGET_SECONDS", SHORT_SECONDS)
        network.proxy.fault = Fault(kind, after=400 * spoilt, times=2 + spoilt)
        with contextlib.suppress(ServiceUnavailable, TransferError):
            publish(output, run_id="run1", name="voice", files=files)
        network.proxy.fault = None
        monkeypatch.setattr(retrying, "BUDGET_SECONDS", BUDGET_SECONDS)
        assert find_release(output, "run1") is None or verify(f"{output}/runs/run1")
    publish(output, run_id="run1", name="voice", files=files)
    assert len(verify(output)) == 2


@pytest.mark.fault(GROUP, "while checkpoints are copied", "the checkpoint is whole, or there is none; training goes on")
@pytest.mark.parametrize("kind", ["cut", "reset", "black hole", "drip"])
def test_a_checkpoint_through_a_network_that_keeps_failing_is_whole_or_absent_and_training_goes_on(
    network: Network, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = kept(tmp_path / "disk", network)
    for step in range(1, 4):
        monkeypatch.setattr(retrying, "BUDGET_SECONDS", SHORT_SECONDS)
        network.proxy.fault = Fault(kind, "up", after=50_000 * step, times=2 + step)
        checkpoints.save(step, lambda folder: written(folder, CONTENT[:300_000]).rename(folder / "curve.json"))
        assert checkpoints.copying
        checkpoints.copying.join()
        network.proxy.fault = None
        monkeypatch.setattr(retrying, "BUDGET_SECONDS", BUDGET_SECONDS)
        found = kept(tmp_path / f"pod {step}", network).newest()
        assert found is None or (found / "curve.json").read_bytes() == CONTENT[:300_000]
    assert [path.name for path in sorted((tmp_path / "disk").iterdir())] == ["step-00000002", "step-00000003"]


def kept(folder: Path, network: Network) -> Checkpoints:
    return Checkpoints(folder, ResumeConfig(steps=1), Mirror(network.near.uri, "run1"), "finetune/abc/training")
