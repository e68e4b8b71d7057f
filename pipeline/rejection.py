"""What becomes of a release that fails a gate: it is published all the same, so that it can be looked at, but under
rejected/ in the output, where nobody who reads latest.json or the plain names meets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from pipeline.artifacts import Release
from pipeline.config import GateConfig
from pipeline.errors import CheckFailed, DataError
from pipeline.gates import failed, limits, rejection
from pipeline.metrics import GateResult, Metrics
from pipeline.publish import always, complete, find_release, publish, read_metrics, refuse_foreign_files


class Rejected(CheckFailed):
    """The release under rejected/ is what is left of it: no other record of the failure is needed."""


def place_of(output: str) -> str:
    """The output of rejected releases: laid out as any other, so `verify` and a person find everything in it."""
    return f"{output.rstrip('/')}/rejected"


def publish_judged(
    output: str,
    figures: Metrics,
    *,
    run_id: str,
    name: str,
    files: Mapping[str, Path],
    confirm: Callable[[], None] = always,
) -> Release:
    """Publish under `output` if every gate passed; else under rejected/ in it, and raise `Rejected`."""
    if not failed(figures.gates):
        return publish(output, run_id=run_id, name=name, files=files, confirm=confirm)
    release = publish(place_of(output), run_id=run_id, name=name, files=files, confirm=confirm)
    raise Rejected(verdict(release, figures.gates))


def refuse_rejected(output: str, cfg: GateConfig, run_id: str, names: Sequence[str]) -> None:
    """Raises the same `Rejected` again if this run's release was rejected before and still lies there.

    `names` are the plain names that a rejected release will have: `TargetTaken` if one is somebody else's file.
    """
    if not limits(cfg):
        return
    place = place_of(output)
    if release := find_release(place, run_id):
        complete(release)
        raise Rejected(verdict(release, results_of(release)))
    refuse_foreign_files(place, names)


def verdict(release: Release, results: Sequence[GateResult]) -> str:
    lies = f"the files and their metrics lie in {release.output} as run {release.run_id}"
    return f"rejected by {rejection(results)}; {lies}"


def results_of(release: Release) -> list[GateResult]:
    """How a standing release was judged, from its metrics.json."""
    try:
        return [GateResult.model_validate(result) for result in read_metrics(release)["gates"]]
    except (KeyError, TypeError, ValidationError) as e:
        raise DataError(f"metrics.json of {release.uri} does not say how it was judged; remove that run") from e
