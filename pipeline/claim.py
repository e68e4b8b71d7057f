"""What a job holds while it works, its work folder and, once its run is known, the run's lease; and what it leaves when
it fails for good."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from pipeline.artifacts import Release
from pipeline.config import JobConfig
from pipeline.failure import Failures
from pipeline.lease import Lease
from pipeline.publish import find_release
from pipeline.storage import open_store
from pipeline.work_folder import alone_in


class Claim:
    """Everything is given back at the end of the block, however that comes."""

    def __init__(self, cfg: JobConfig, *, retry_failed: bool = False) -> None:
        self.cfg, self.retry_failed = cfg, retry_failed
        self.lease: Lease | None = None
        self.failures: Failures | None = None
        self.held = ExitStack()

    def __enter__(self) -> Claim:
        return self

    def work_folder(self) -> None:
        """Raises `TryLater` while another job is in it."""
        self.held.enter_context(alone_in(self.cfg.work_dir, self.cfg.lease.wait_seconds))

    def run(self, run_id: str, llama_cpp: str) -> Release | None:
        """Hold the run; its release, if another start of it has just published that.

        Raises `TryLater` while another start works on it, and the run's own error again if it has failed for good.
        """
        store = open_store(self.cfg.output)
        self.lease = Lease(store, run_id, self.cfg.lease.seconds)
        self.held.callback(self.lease.release)
        self.lease.acquire(self.cfg.lease.wait_seconds)
        if release := find_release(self.cfg.output, run_id):
            return release
        failures = Failures(store, run_id, self.cfg, llama_cpp)
        failures.refuse(retry=self.retry_failed)
        self.failures = failures
        return None

    def confirm(self) -> None:
        """Right before the release: raises `TryLater` if the run is no longer this process's."""
        if self.lease:
            self.lease.confirm()

    def require_held(self) -> None:
        """Before writing what another start could go on from: raises if the run is not surely this process's."""
        if self.lease and not self.lease.is_held:
            self.lease.confirm()

    def require_not_overtaken(self) -> None:
        """Before work of minutes: raises `TryLater` if another start does the run now. Asks nobody."""
        if self.lease and self.lease.overtaken:
            self.lease.confirm()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.held:
            if error and self.failures and self.lease and self.lease.is_held:
                self.failures.remember(error)
