"""A SageMaker training job, from the files that the platform writes and reads under /opt/ml
(https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo.html). It needs no toolkit, and so no
SM_* variable, which a toolkit would set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import JobConfig
from pipeline.errors import ConfigError
from pipeline.json_object import json_object
from pipeline.platforms import Nodes, Values

ML = Path("opt/ml")
CONFIG = ML / "input/config"
HYPERPARAMETERS, CHANNELS, HOSTS = "hyperparameters.json", "inputdataconfig.json", "resourceconfig.json"
NOT_OURS = ("sagemaker_", "_tuning_")  # the Python SDK's own and a tuning job's
READABLE = ("File", "FastFile")  # input modes in which a channel is a folder
ROLES = {"model": "model.base", "calibration": "calibration.text"}  # channels; each other one holds quotes
GRACE_SECONDS = 120  # "delays job termination for 120 seconds"


@dataclass(frozen=True)
class SageMaker:
    root: Path

    name = "SageMaker"

    def orders(self) -> Values:
        """The hyperparameters. All are text, and the Python SDK's framework estimators make it JSON."""
        return {
            name.removeprefix("--").replace("-", "_"): (decoded(value), f"hyperparameter {name}")
            for name, value in self._read(HYPERPARAMETERS).items()
            if not name.startswith(NOT_OURS)
        }

    def places(self) -> Values:
        """Checkpoints are copied to /opt/ml/checkpoints, not worked on there: SageMaker sends its files to S3 one by
        one, in any order, while they are written."""
        ml = self.root / ML
        found: dict[str, tuple[Any, str]] = {
            "output": (str(ml / "model"), "SageMaker's /opt/ml/model"),
            "work_dir": (str(self.root / "tmp/quotesmith"), "SageMaker's storage volume"),
            "tensorboard": (str(ml / "output/tensorboard"), "SageMaker's /opt/ml/output/tensorboard"),
            "grace_seconds": (GRACE_SECONDS, "SageMaker's time between its signals"),
        }
        if (ml / "checkpoints").is_dir():
            where = "SageMaker's /opt/ml/checkpoints"
            found |= {"resume.uri": (str(ml / "checkpoints"), where), "resume.upload": ("always", where)}
        return found | self._channels()

    def _channels(self) -> dict[str, tuple[Any, str]]:
        quotes, found = [], {}
        for name, channel in sorted(self._read(CHANNELS).items()):
            mode = channel.get("TrainingInputMode", "File") if isinstance(channel, dict) else "File"
            if mode not in READABLE:
                raise ConfigError(f"channel {name} has TrainingInputMode {mode}; needed {' or '.join(READABLE)}")
            folder = str(self.root / ML / "input/data" / name)
            if name in ROLES:
                found[ROLES[name]] = (folder, f"SageMaker channel {name}")
            else:
                quotes.append((name, folder))
        if quotes:
            names = ", ".join(name for name, _ in quotes)
            found["input"] = ([folder for _, folder in quotes], f"SageMaker channel {names}")  # type: ignore[assignment]
        return found

    def check(self, cfg: JobConfig) -> None:
        """Nothing is impossible here."""

    def nodes(self) -> Nodes:
        config = self._read(HOSTS)
        hosts, this = config.get("hosts", []), config.get("current_host")
        if len(hosts) < 2:
            return Nodes()
        if this not in hosts:
            raise ConfigError(f"{HOSTS} has current_host {this}, which is not among its hosts {', '.join(hosts)}")
        return Nodes(len(hosts), hosts.index(this), hosts[0])

    def note(self) -> Path:
        """FailureReason, of which SageMaker shows the first 1,024 characters."""
        return self.root / ML / "output/failure"

    def _read(self, name: str) -> dict[str, Any]:
        path = self.root / CONFIG / name
        if not path.is_file():
            return {}
        try:
            return json_object(path.read_text(encoding="utf-8"), str(path), ConfigError)
        except UnicodeDecodeError as e:
            raise ConfigError(f"{path} is not UTF-8 text") from e


def decoded(value: Any) -> Any:
    """JSON text of a text; anything else is read as a flag's value is."""
    if isinstance(value, str) and value.startswith('"'):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def find(env: Mapping[str, str], root: Path) -> SageMaker | None:
    files = (HYPERPARAMETERS, CHANNELS, HOSTS)
    return SageMaker(root) if any((root / CONFIG / name).is_file() for name in files) else None
