"""From tuned model to quantized file."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import Section

UNQUANTIZED = ("F32", "F16", "BF16")
LONGEST_CONTEXT = 131_072  # GPT-2's new rows are 400 MB in fp32 then, and a text of that length is hours on a CPU


class CalibrationConfig(Section):
    """The text that pruning, recovery and quantization measure the model on; never the hold-out."""

    generated: int = Field(
        192, ge=0, description="Texts sampled from the tuned model to calibrate on, beside the training quotes."
    )
    text: str = Field("", description="A text file, local or in a bucket, to calibrate on too.")
    max_tokens: int = Field(32_768, ge=256, description="Calibration tokens at most, evenly from every kind of text.")
    validation: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.1, description="Share of it that recovery, adapting and finishing stop by instead of learning from."
    )


class SparsityConfig(Section):
    """Zeroing weights of the block matrices."""

    method: str = Field("sparsegpt", description="sparsegpt, wanda, magnitude, random: a file in pipeline/sparsity/.")
    ratio: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="Share of weights set to zero.")
    refit: bool = Field(
        True,
        description="sparsegpt, wanda: choose again which weights stay, all against all, and fit them to what the "
        "dense model computes (least squares). false: the methods as published.",
    )
    keep_zeros: bool = Field(
        False, description="Pruned weights are exactly zero in the GGUF too, at the quality cost that metrics.json has."
    )
    scope: Literal["matrix", "global"] = Field(
        "matrix", description="matrix: the same share in each; global: one threshold for all."
    )
    pattern: str = Field(
        "unstructured",
        pattern=r"^(unstructured|\d+:\d+)$",
        description="unstructured, or n:m: at most n weights of each m neighbours in a row stay.",
    )

    @property
    def kept(self) -> tuple[int, int]:
        """n and m of an n:m pattern."""
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def exact_ratio(self) -> float:
        """The share of zeros to make and to measure: 1:3 is two thirds, however it was rounded in `ratio`."""
        return self.ratio if self.pattern == "unstructured" else 1 - self.kept[0] / self.kept[1]

    @model_validator(mode="after")
    def pattern_agrees(self) -> Self:
        if self.pattern == "unstructured":
            return self
        n, m = self.kept
        if not 0 < n < m:
            raise ValueError(
                f"sparsity.pattern {self.pattern} keeps n of m weights, so 0 < n < m is needed; choose 2:4, for example"
            )
        if abs(self.ratio - (1 - n / m)) > 1e-3:
            raise ValueError(
                f"sparsity.pattern {self.pattern} zeroes {1 - n / m:g} of the weights, but sparsity.ratio is "
                f"{self.ratio:g}; set sparsity.ratio to {1 - n / m:g}"
            )
        if self.scope == "global":
            raise ValueError("an n:m pattern is per row, so sparsity.scope must be matrix")
        return self


class DistillConfig(Section):
    """A training to predict what the tuned model predicts."""

    steps: int
    batch_tokens: int = Field(512, ge=32, description="Tokens a step at most; more small steps do more.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="The highest learning rate of the schedule.")
    patience: int = Field(3, ge=1, description="Stop after this many validations without a lower loss.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Of the arithmetic. auto: bf16 where the GPU or CPU has instructions for it."
    )


class RecoverConfig(DistillConfig):
    """Training the weights that pruning left, the mask fixed, to predict what the tuned model predicts."""

    steps: int = Field(120, ge=0, description="Optimizer steps; 0: no recovery.")
    features: float = Field(
        0.0, ge=0, description="Weight of the difference in the blocks' outputs, beside that in the predictions."
    )


class ExportConfig(Section):
    """The F16 GGUF and its proof."""

    context: int = Field(
        0,
        ge=0,
        le=LONGEST_CONTEXT,
        description="Positions of the exported model, more than the base model's; 0: as many as it has.",
    )
    context_steps: int = Field(0, ge=0, description="Steps of training on the positions that were added.")

    logits_tolerance: float = Field(
        0.01,
        gt=0,
        description="Largest allowed root-mean-square difference of llama.cpp's log-probabilities from torch's, "
        "as a share of their standard deviation. Measured: 0.0005 to 0.001 for GPT-2 and SmolLM2.",
    )


class QuantizeConfig(Section):
    """The quantized GGUF files."""

    types: tuple[str, ...] = Field(("Q2_K",), min_length=1, description="llama.cpp file types, one file each.")
    fallback: Literal["warn", "error"] = Field(
        "warn", description="What to do when llama-quantize stores a matrix in another type than asked for."
    )
    encoder: Literal["gptq", "llama.cpp"] = Field(
        "gptq",
        description="What rounds Q2_K, Q3_K and Q6_K tensors. gptq: our encoder, with error feedback. llama.cpp: "
        "llama-quantize.",
    )
    importance: bool = Field(True, description="Give llama-quantize an importance matrix of the calibration text.")
    max_bytes: int = Field(
        0, ge=0, description="Choose tensor types by their measured effect so that the file fits; 0: the type's own."
    )

    @model_validator(mode="after")
    def one_mix(self) -> Self:
        limited = [kind for kind in self.types if kind not in UNQUANTIZED]
        if self.max_bytes and len(limited) > 1:
            raise ValueError(
                f"quantize.max_bytes chooses one mix of tensor types, but quantize.types names {', '.join(limited)}; "
                "name one of them"
            )
        return self


class AdaptConfig(DistillConfig):
    """Training the matrices that keep their zeros once more, beside what is rounded already."""

    steps: int = Field(
        120,
        ge=0,
        description="Optimizer steps; 0: all matrices are rounded at once, as they are with sparsity.keep_zeros, with "
        "quantize.encoder llama.cpp, and in a file without Q2_K matrices.",
    )


class FinishConfig(DistillConfig):
    """Training the quantized file to predict what the tuned model predicts, on its exact grid."""

    steps: int = Field(120, ge=0, description="Optimizer steps; 0: the file stays as it was quantized.")
    train: Literal["all", "vectors"] = Field(
        "all",
        description="vectors: what the file keeps in F32 (biases, norms, positions). all: also the scales of the "
        "matrices' blocks.",
    )
    learning_rate: float = Field(
        5e-5,
        gt=0,
        le=1,
        description="The highest learning rate of the schedule; scales get 10 times that, norms and biases 3 times in "
        "an adapted file and 30 times in another.",
    )
