"""What a run that no retry can help leaves in the output: FAILURE.json, so that a platform's automatic restart ends
in seconds with the same code and sentence instead of paying for the same hours again."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from typing import Any

from pipeline import signals
from pipeline.config import JobConfig
from pipeline.errors import CheckFailed, ConfigError, DataError, InputMissing, QuotesmithError
from pipeline.foreign_text import printable
from pipeline.manifest import as_json
from pipeline.metrics import gpu_name
from pipeline.redact import LONGEST_SENTENCE, one_sentence
from pipeline.rejection import Rejected
from pipeline.retrying import within
from pipeline.stage import code_digest
from pipeline.storage import Store
from pipeline.versions import versions

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
WRITE_SECONDS = 10.0  # the failure itself must not wait for a bucket that is away
# By exit code, those that come again with the same settings, inputs and image. Not 77: rights are granted beside all
# three, take minutes to spread, and preflight looks at them within seconds. Not 73: what stands in the output is looked
# at first in every start, and may have been moved away. A bug of ours has no class here: nobody knows whether it stays.
PERMANENT = {kind.exit_code: kind for kind in (DataError, InputMissing, CheckFailed, ConfigError)}


def failure_name(run_id: str) -> str:
    return f"runs/{run_id}/FAILURE.json"


class Failures:
    """Of one run, whose lease this process holds."""

    def __init__(self, store: Store, run_id: str, cfg: JobConfig, llama_cpp: str) -> None:
        self.store, self.run_id, self.name = store, run_id, failure_name(run_id)
        self.same = {
            "settings_sha256": hashlib.sha256(cfg.model_dump_json().encode()).hexdigest(),
            "code_sha256": code_digest(),
            "versions": versions(llama_cpp),
            "gpu": gpu_name(),  # what does not fit into one can fit into another
        }

    def refuse(self, *, retry: bool) -> None:
        """Raise the same error again if the run failed for good with these settings and this image.

        Else, and with `retry`, an older failure is removed: the run is about to be tried.
        """
        if self.store.stat(self.name) is None:
            return
        error = None if retry else self._standing()
        if error:
            raise error
        self.store.remove(self.name)
        log.info("failure: %s/%s is removed, the run is tried again", self.store.uri, self.name)

    def remember(self, error: BaseException) -> None:
        """Write FAILURE.json if no retry can help `error`. Raises nothing: the error itself must come through.

        What is raised after a signal can be what a library has made of it.
        """
        if not isinstance(error, QuotesmithError) or isinstance(error, Rejected) or error.exit_code not in PERMANENT:
            return
        if signals.is_stopping():
            return
        content = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "exit_code": error.exit_code,
            "error": one_sentence(str(error)),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **self.same,
        }
        where = f"{self.store.uri}/{self.name}"
        try:
            within(lambda: self._write(as_json(content)), WRITE_SECONDS, where)
        except Exception as e:
            log.warning("failure: not recorded, so that a restart will try again: %s", e)

    def _write(self, data: bytes) -> None:
        found = self.store.stat(self.name)
        self.store.compare_and_swap(self.name, data, found.version if found else None)

    def _standing(self) -> QuotesmithError | None:
        content = self._read()
        kind = PERMANENT.get(content.get("exit_code", 0))
        if kind is None or any(content.get(key) != value for key, value in self.same.items()):
            return None
        said, when = (printable(content.get(key), LONGEST_SENTENCE) for key in ("error", "time"))
        return kind(
            f"{said} (it ended so at {when}, with the same settings, inputs and image; to try it again give "
            f"--retry-failed, which removes {self.store.uri}/{self.name})"
        )

    def _read(self) -> dict[Any, Any]:
        """Empty if it is no record of ours: then it keeps nobody from trying."""
        try:
            content = json.loads(self.store.read(self.name))
        except (ValueError, RecursionError, InputMissing, DataError):  # the last: it is larger than any of ours
            return {}
        return content if isinstance(content, dict) and isinstance(content.get("exit_code"), int) else {}
