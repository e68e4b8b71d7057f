"""Restarts, several starts of one run, and several machines for one."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import Section


class ResumeConfig(Section):
    """Going on after a kill. None of it changes the result."""

    minutes: float = Field(
        5,
        ge=0,
        description="Minutes between two checkpoints within training, recovery, extension, adapting and finishing; 0: "
        "none by time. Two are kept, each 12 to 16 bytes a trained parameter.",
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


class NodesConfig(Section):
    """Machines and GPUs that train together. The result is that of one GPU, nearly."""

    count: int = Field(1, ge=1, le=1000, description="Machines that train together, each with this command.")
    rank: int = Field(0, ge=0, description="Which of them this is; 0, the first, does all the rest of the job, too.")
    master: str = Field("localhost", min_length=1, description="Name or address of the first machine.")
    port: int = Field(
        29500, ge=1, le=65534, description="Port of the first machine where they meet; the next one is used, too."
    )
    processes: int = Field(
        0,
        ge=0,
        description="Training processes on each machine; 0: as many as it has GPUs and a step can be split over.",
    )
    wait_seconds: float = Field(900, ge=1, description="How long machines wait for each other to come.")
    lost_seconds: float = Field(
        60, ge=3, description="A machine that is silent for so long is taken for lost, and training ends with code 75."
    )

    @model_validator(mode="after")
    def rank_is_one_of_them(self) -> Self:
        if self.rank >= self.count:
            raise ValueError(f"nodes.rank is {self.rank}, but nodes.count is {self.count}; ranks begin at 0")
        return self
