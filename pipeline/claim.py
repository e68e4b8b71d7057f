"""What a job holds while it works: its work folder and, once its run is known, the run's lease."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from pipeline.artifacts import Release
from pipeline.config import JobConfig
from pipeline.lease import Lease
from pipeline.publish import find_release
from pipeline.storage import open_store
from pipeline.work_folder import alone_in


class Claim:
    """Everything is given back at the end of the block, however that comes."""

    def __init__(self, cfg: JobConfig) -> None:
        self.cfg = cfg
        self.lease: Lease | None = None
        self.held = ExitStack()

    def __enter__(self) -> Claim:
        return self

    def work_folder(self) -> None:
        """Raises `TryLater` while another job is in it."""
        self.held.enter_context(alone_in(self.cfg.work_dir, self.cfg.lease.wait_seconds))

    def run(self, run_id: str) -> Release | None:
        """Hold the run; its release, if another start of it has just published that.

        Raises `TryLater` while another start works on it.
        """
        self.lease = Lease(open_store(self.cfg.output), run_id, self.cfg.lease.seconds)
        self.held.callback(self.lease.release)
        self.lease.acquire(self.cfg.lease.wait_seconds)
        return find_release(self.cfg.output, run_id)

    def confirm(self) -> None:
        """Right before the release: raises `TryLater` if the run is no longer this process's."""
        if self.lease:
            self.lease.confirm()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.held.close()
