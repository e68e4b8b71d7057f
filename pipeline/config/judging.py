"""What is measured, demanded and published."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipeline.config.section import Section, Share

SAMPLING = ("max_new_tokens", "temperature", "top_p", "repeat_penalty")


class EvaluateConfig(Section):
    """The ledger."""

    max_quotes: int = Field(500, ge=2, description="Held-out quotes to score at most (the same for every row).")
    bootstrap: int = Field(10_000, ge=100, le=1_000_000, description="Resamples behind each 95% interval.")
    prompts: tuple[str, ...] = Field(
        ("", "I", "The", "People", "You have to", "My"),
        min_length=1,
        description="Beginnings of the sample generations.",
    )
    samples: int = Field(4, ge=1, le=1000, description="Generations for each prompt, each with its own seed.")
    max_new_tokens: int = Field(
        80, ge=1, le=100_000, description="A generation that has not stopped by itself is cut here."
    )
    temperature: float = Field(
        0.8, ge=0, le=100, description="Of the generations; 0 always takes the most likely token."
    )
    top_p: float = Field(0.95, gt=0, le=1, description="Sample from the most likely tokens that make up this share.")
    repeat_penalty: float = Field(1.1, ge=1, le=100, description="How much less likely a token of the last 64 is made.")

    @property
    def sampling(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SAMPLING}


class GateConfig(Section):
    """Limits for each file of the release; 0: no limit.

    A release with a file that misses one is published under rejected/, and the job ends with code 70.
    """

    ppl_ratio: float = Field(0.0, ge=0, description="Perplexity against the tuned model's, at most.")
    kld: float = Field(0.0, ge=0, description="KL divergence from the tuned model in nats a token, at most.")
    max_bytes: int = Field(0, ge=0, description="Size of a file, at most.")
    stop_rate: Share = Field(0.0, description="Share of the generations that end by themselves, at least.")


class PublishConfig(Section):
    """The release."""

    safetensors: bool = Field(False, description="Publish the final model as safetensors too.")
