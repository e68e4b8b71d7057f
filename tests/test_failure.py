from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from pipeline import failure as module
from pipeline import retrying, signals, storage
from pipeline.bucket import BucketStore
from pipeline.claim import Claim
from pipeline.config import JobConfig
from pipeline.errors import CheckFailed, ConfigError, DataError, InputMissing, QuotesmithError, TryLater
from pipeline.failure import PERMANENT, Failures, failure_name
from pipeline.lease import lease_name
from pipeline.rejection import Rejected
from pipeline.storage import Store, open_store
from tests.faulty_requests import FaultyRequests, Service

damaged_record = pytest.mark.fault(
    "leases, failures, checkpoints",
    "a LEASE.json or FAILURE.json that is damaged, absurd or huge",
    "keeps nobody from working",
)

NAME = failure_name("run1")


@pytest.fixture
def cfg(tmp_path: Path) -> JobConfig:
    return JobConfig(output=str(tmp_path / "out"), work_dir=tmp_path / "work")


@pytest.fixture
def store(cfg: JobConfig) -> Store:
    return open_store(cfg.output)


def failures(store: Store, cfg: JobConfig, llama_cpp: str = "1") -> Failures:
    return Failures(store, "run1", cfg, llama_cpp)


def work(cfg: JobConfig, error: BaseException | None = None, *, retry_failed: bool = False) -> None:
    """A job that knows its run and then fails."""
    with Claim(cfg, retry_failed=retry_failed) as claim:
        claim.work_folder()
        claim.run("run1", "1")
        if error:
            raise error


@pytest.mark.parametrize("error", QuotesmithError.__subclasses__())
def test_only_what_no_retry_can_help_is_recorded(error: type[QuotesmithError], cfg: JobConfig, store: Store) -> None:
    with pytest.raises(error):
        work(cfg, error("found this, needed that"))
    assert (store.stat(NAME) is not None) == (error in (DataError, InputMissing, CheckFailed, ConfigError))
    assert store.stat(lease_name("run1")) is None


@pytest.mark.parametrize(
    "error", [Rejected("by a gate"), KeyboardInterrupt(), ZeroDivisionError(), OSError(28, "full")]
)
def test_rejections_signals_bugs_and_the_machine_are_not_recorded(
    error: BaseException, cfg: JobConfig, store: Store
) -> None:
    with pytest.raises(type(error)):
        work(cfg, error)
    assert store.stat(NAME) is None and store.stat(lease_name("run1")) is None


@pytest.mark.parametrize("kind", PERMANENT.values())
def test_a_restart_fails_with_the_same_code_and_sentence(
    kind: type[QuotesmithError], cfg: JobConfig, store: Store
) -> None:
    with pytest.raises(kind):
        work(cfg, kind("found this, needed that"))
    written = store.read(NAME)
    for _ in range(2):
        with pytest.raises(kind, match=r"^found this, needed that \(it ended so at 20.*--retry-failed.*FAILURE\.json"):
            work(cfg)
    assert store.read(NAME) == written and store.stat(lease_name("run1")) is None


def test_what_failed_is_tried_again_on_demand_and_a_success_leaves_no_failure(cfg: JobConfig, store: Store) -> None:
    with pytest.raises(CheckFailed):
        work(cfg, CheckFailed("bad"))
    work(cfg, retry_failed=True)
    assert store.stat(NAME) is None
    work(cfg)


def test_other_settings_another_image_or_another_gpu_try_again(
    cfg: JobConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = failures(store, cfg)
    others = [failures(store, cfg.model_copy(update={"seed": 7})), failures(store, cfg, "2")]
    with monkeypatch.context() as patch:
        patch.setattr(module, "code_digest", lambda: "other code")
        others.append(failures(store, cfg))
    monkeypatch.setattr(module, "gpu_name", lambda: "a larger one")
    others.append(failures(store, cfg))
    for other in others:
        failed.remember(CheckFailed("bad"))
        with pytest.raises(CheckFailed):
            failed.refuse(retry=False)
        other.refuse(retry=False)
        assert store.stat(NAME) is None


def test_a_later_failure_replaces_an_older_one(cfg: JobConfig, store: Store) -> None:
    failures(store, cfg).remember(CheckFailed("first"))
    failures(store, cfg).remember(DataError("second"))
    with pytest.raises(DataError, match=r"^second"):
        failures(store, cfg).refuse(retry=False)


@damaged_record
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"exit_code": "70"}', b'{"exit_code": [1]}', b"[" * 99999]
)
def test_a_file_that_is_no_record_of_ours_keeps_nobody_from_trying(
    content: bytes, cfg: JobConfig, store: Store
) -> None:
    store.put_if_absent(NAME, content)
    failures(store, cfg).refuse(retry=False)


@damaged_record
def test_a_file_that_is_larger_than_any_record_keeps_nobody_from_trying(
    cfg: JobConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LARGEST_READ", 100)
    store.put_if_absent(NAME, b'{"exit_code": 65}' + b" " * 100)
    failures(store, cfg).refuse(retry=False)
    assert store.stat(NAME) is None


def test_no_secret_and_no_second_line_is_kept(cfg: JobConfig, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-in-the-mine")
    failures(store, cfg).remember(
        DataError("the url https://x/y?sig=abcdefgh of canary-in-the-mine is bad" + "!" * 5000)
    )
    kept = store.read(NAME).decode()
    assert "canary" not in kept and "abcdefgh" not in kept and len(json.loads(kept)["error"]) == 1000
    store.put(NAME, altered(store, cfg))
    with pytest.raises(DataError) as caught:
        failures(store, cfg).refuse(retry=False)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


def altered(store: Store, cfg: JobConfig) -> Path:
    """As somebody else may have left it."""
    path = cfg.work_dir.parent / "altered"
    path.write_text(json.dumps({**json.loads(store.read(NAME)), "error": "a\n\x1b[2Jb" * 10_000, "time": "1\n2"}))
    return path


def test_a_bucket_that_is_away_hides_no_error(cfg: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.2)
    requests = FaultyRequests(Service(), 0)
    monkeypatch.setattr("pipeline.claim.open_store", lambda uri: BucketStore(requests))
    monkeypatch.setattr("pipeline.publish.open_store", lambda uri: BucketStore(requests))
    started = time.monotonic()
    with pytest.raises(DataError, match=r"^the data$"), Claim(cfg) as claim:
        claim.run("run1", "1")
        monkeypatch.setattr(retrying, "BUDGET_SECONDS", 0.1)
        requests.left = 0
        raise DataError("the data")
    assert time.monotonic() - started < 5


def test_a_process_that_was_overtaken_records_nothing(cfg: JobConfig, store: Store) -> None:
    with pytest.raises(DataError), Claim(cfg) as claim:
        claim.run("run1", "1")
        assert claim.lease
        found = store.stat(lease_name("run1"))
        assert found and store.compare_and_swap(lease_name("run1"), b'{"holder": "another"}', found.version)
        with pytest.raises(TryLater):
            claim.confirm()
        raise DataError("of a process that is too late")
    assert store.stat(NAME) is None and store.read(lease_name("run1")) == b'{"holder": "another"}'


def test_what_a_library_has_made_of_a_signal_is_not_recorded(
    cfg: JobConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals.state, "received", signal.SIGINT)
    with pytest.raises(DataError), Claim(cfg) as claim:
        claim.run("run1", "1")
        raise DataError("the model cannot be loaded (interrupted)")
    assert store.stat(NAME) is None


def test_a_failure_before_the_run_is_known_leaves_nothing(cfg: JobConfig) -> None:
    with pytest.raises(DataError), Claim(cfg) as claim:
        claim.work_folder()
        raise DataError("no quotes")
    assert not Path(cfg.output).exists()
