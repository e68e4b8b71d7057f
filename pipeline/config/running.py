"""Restarts, and several starts of one run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.section import Section


class ResumeConfig(Section):
    """Going on after a kill. None of it changes the result."""

    minutes: float = Field(
        5,
        ge=0,
        description="Minutes between two checkpoints within training, recovery, extension and finishing; 0: none by "
        "time. Two are kept, each about 12 bytes a trained parameter.",
    )
    steps: int = Field(
        0,
        ge=0,
        description="A checkpoint every so many optimizer steps, too; 0: none by steps. With neither there is none at "
        "a signal.",
    )
    upload: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Copy checkpoints and finished stages to resume.uri, for a restart on an empty disk. auto: if that "
        "is a bucket.",
    )
    uri: str = Field("", description="A folder or a gs:// or s3:// prefix for those copies. Default: the output.")
    keep: bool = Field(False, description="Leave those copies there when the release is published.")


class LeaseConfig(Section):
    """Two starts of the same run: one works. None of it changes the result."""

    seconds: float = Field(
        60, ge=2, le=3600, description="A start that has died is followed by another after this time at the latest."
    )
    wait_seconds: float = Field(
        0, ge=0, description="How long to wait for another start of the same run before ending with code 75."
    )
