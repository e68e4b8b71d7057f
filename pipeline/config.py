"""Every setting of a job, in one typed model. Flags, environment names, YAML keys, `--help` and the README
table are made from it (`settings.py`); stages receive only their own section."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

DEFAULT_FILES = ("kanye-quotes.txt", "trump-quotes.txt")
BASE_MODEL = "openai-community/gpt2"
BASE_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # the hub's main since 2024-02-19; pinned: main can move

Share = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
ReleaseName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class DataConfig(Section):
    """Which text, and how it becomes quotes."""

    files: tuple[NonEmpty, ...] = Field(
        DEFAULT_FILES,
        min_length=1,
        description="File names or globs to take from each input folder or prefix. If none of the default names "
        "is there, every .txt and .jsonl file (also .gz) is taken.",
    )
    unit: Literal["auto", "line", "paragraph"] = Field(
        "auto",
        description="What one quote is: a line, or a paragraph between blank lines. auto: paragraph if blank "
        "lines separate blocks of lines in which most lines end in mid-sentence, else line.",
    )
    text_field: str = Field("text", description="Name of the field that holds the quote in JSONL files.")
    max_quote_bytes: int = Field(
        1_000_000,
        ge=100,
        description="A longer line, paragraph or JSONL record is refused as not being a quote.",
    )
    max_file_bytes: int = Field(8 * 1024**3, ge=1000, description="A larger file, after decompression, is refused.")


class TokensConfig(Section):
    """How quotes are split and tokenized."""

    max_length: int = Field(
        128,
        ge=8,
        description="Longest example in tokens, begin and end tokens included; the rest is cut off.",
    )
    holdout: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share of quotes kept out of training and used for every number in the ledger."
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of quotes, beside the hold-out, for early stopping and best-epoch selection."
    )

    @model_validator(mode="after")
    def leaves_training_quotes(self) -> Self:
        if self.holdout + self.validation >= 1:
            raise ValueError("tokens.holdout and tokens.validation together must leave quotes to train on")
        return self


class ModelConfig(Section):
    """The base model."""

    base: str = Field(
        BASE_MODEL,
        min_length=1,
        description="Hub id, a local folder with config.json and safetensors, or a Llama-type .gguf file.",
    )
    revision: str = Field(
        "", description=f"Hub commit. Default: {BASE_REVISION[:12]}… for {BASE_MODEL}, else required."
    )


class TrainConfig(Section):
    """Fine-tuning."""

    method: Literal["full", "lora", "qlora"] = Field(
        "full", description="full: all weights. lora: low-rank adapters. qlora: adapters on an NF4 base."
    )
    epochs: float = Field(2, gt=0, description="Passes over the training quotes.")
    max_steps: int = Field(0, ge=0, description="Stop after this many optimizer steps; 0: epochs decide.")
    batch_size: int = Field(4, ge=1, description="Examples a step on one device.")
    accumulation: int = Field(4, ge=1, description="Batches whose gradients are added up for one step.")
    learning_rate: float = Field(3e-4, gt=0, le=1, description="The highest learning rate of the schedule.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's pull of the weights to zero.")
    warmup_ratio: Share = Field(0.0, description="Share of the steps over which the learning rate rises.")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How the learning rate falls after the warm-up."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0: not clipped.")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="auto: fp16 with fp32 master weights on a GPU, fp32 on a CPU."
    )
    lora_rank: int = Field(16, ge=1, le=1024, description="Rank of the adapters (lora, qlora).")
    lora_alpha: float = Field(32, gt=0, description="Adapters are scaled by alpha / rank.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="Share of adapter inputs dropped while training."
    )
    select_best: bool = Field(False, description="Keep the epoch with the lowest validation loss, not the last.")
    early_stopping: int = Field(
        0, ge=0, description="Stop after this many epochs without a lower validation loss; 0: never."
    )
    gradient_checkpointing: bool = Field(False, description="Trade a third more time for less memory.")


class FourbitConfig(Section):
    """Loading the tuned model in 4 bits."""

    enabled: bool = Field(True, description="Load the tuned model back with bitsandbytes NF4 and measure it.")


class CalibrationConfig(Section):
    """The text that pruning, recovery and quantization measure the model on; never the hold-out."""

    generated: int = Field(
        192, ge=0, description="Texts sampled from the tuned model to calibrate on, beside the training quotes."
    )
    text: str = Field("", description="A text file, local or in a bucket, to calibrate on too.")
    max_tokens: int = Field(32_768, ge=256, description="Calibration tokens at most, evenly from every kind of text.")
    validation: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.1, description="Share of it that recovery and finishing stop by instead of learning from."
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
            raise ValueError(f"sparsity.pattern {self.pattern} keeps n of m weights, so 0 < n < m is needed")
        if abs(self.ratio - (1 - n / m)) > 1e-3:
            raise ValueError(
                f"sparsity.pattern {self.pattern} zeroes {1 - n / m:g} of the weights, but sparsity.ratio is "
                f"{self.ratio:g}; set sparsity.ratio to {1 - n / m:g}"
            )
        if self.scope == "global":
            raise ValueError("an n:m pattern is per row, so sparsity.scope must be matrix")
        return self


class RecoverConfig(Section):
    """Training the weights that pruning left, the mask fixed, to predict what the tuned model predicts."""

    steps: int = Field(60, ge=0, description="Optimizer steps; 0: no recovery.")
    batch_tokens: int = Field(1024, ge=32, description="Tokens a step at most.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="The highest learning rate of the schedule.")
    features: float = Field(
        0.0, ge=0, description="Weight of the difference in the blocks' outputs, beside that in the predictions."
    )
    patience: int = Field(3, ge=1, description="Stop after this many validations without a lower loss.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Of the arithmetic. auto: bf16 where the GPU or CPU has instructions for it."
    )


class ExportConfig(Section):
    """The F16 GGUF and its proof."""

    context: int = Field(
        0, ge=0, description="Positions of the exported model, more than the base model's; 0: as many as it has."
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


class FinishConfig(Section):
    """Training the quantized file to predict what the tuned model predicts, on its exact grid."""

    steps: int = Field(60, ge=0, description="Optimizer steps; 0: the file stays as it was quantized.")
    train: Literal["all", "vectors"] = Field(
        "all",
        description="vectors: what the file keeps in F32 (biases, norms, positions). all: also the rounding and the "
        "scales of the matrices.",
    )
    batch_tokens: int = Field(1024, ge=32, description="Tokens a step at most.")
    learning_rate: float = Field(
        5e-5,
        gt=0,
        le=1,
        description="The highest learning rate of the schedule; norms and biases get 30 times that, codes 100 times, "
        "scales 10 times.",
    )
    patience: int = Field(3, ge=1, description="Stop after this many validations without a lower loss.")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="As in recovery.")


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


class ResumeConfig(Section):
    """Going on after a kill. None of it changes the result."""

    minutes: float = Field(
        5,
        ge=0,
        description="Minutes between two checkpoints within training, recovery and finishing; 0: none by time. Two are "
        "kept, each about 12 bytes a trained parameter.",
    )
    steps: int = Field(0, ge=0, description="A checkpoint every so many optimizer steps, too; 0: none by steps.")
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


class JobConfig(Section):
    """A whole job."""

    input: tuple[str, ...] = Field(
        (),
        description="Files, folders, globs, or gs:// and s3:// objects and prefixes. Default: the sample corpus.",
    )
    output: str = Field("out", min_length=1, description="A folder or a gs:// or s3:// prefix for the release.")
    name: ReleaseName = Field("gpt2-ye-trump", description="Files are called NAME-TYPE.gguf.")
    work_dir: Path = Field(Path("work"), description="Where stages keep their files; a rerun skips what is done.")
    llama_cpp: str = Field("", description="Folder with the llama.cpp tools. Default: the newest build in the cache.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if one is visible.")
    seed: int = Field(42, ge=0, lt=2**32, description="Of training, pruning, resampling and generations.")
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="auto: text and progress bars on a terminal, else one JSON object a line."
    )
    grace_seconds: float = Field(
        10, gt=0, description="Seconds from SIGTERM to SIGKILL on the platform: by then the job has ended by itself."
    )
    data: DataConfig = DataConfig()
    tokens: TokensConfig = TokensConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    fourbit: FourbitConfig = FourbitConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    sparsity: SparsityConfig = SparsityConfig()
    recover: RecoverConfig = RecoverConfig()
    export: ExportConfig = ExportConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    finish: FinishConfig = FinishConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    publish: PublishConfig = PublishConfig()
    resume: ResumeConfig = ResumeConfig()
    lease: LeaseConfig = LeaseConfig()

    @field_validator("work_dir")
    @classmethod
    def at_home(cls, path: Path) -> Path:
        """A ~ from YAML or a container's environment, where no shell has replaced it."""
        return Path(os.path.expanduser(path))  # noqa: PTH111  (Path.expanduser raises for an unknown user)

    @model_validator(mode="after")
    def settings_agree(self) -> Self:
        if (self.train.early_stopping or self.train.select_best) and not self.tokens.validation:
            raise ValueError(
                "train.early_stopping and train.select_best choose by validation loss, but tokens.validation is 0; "
                "set tokens.validation to 0.1 (the hold-out stays unseen)"
            )
        if self.train.scheduler == "constant" and self.train.warmup_ratio:
            raise ValueError(
                "train.scheduler constant has no warm-up, but train.warmup_ratio is set; use constant_with_warmup"
            )
        if self.sparsity.keep_zeros and self.quantize.encoder != "gptq":
            raise ValueError(
                "sparsity.keep_zeros needs our encoder, because llama-quantize gives Q2_K tensors a grid without zero; "
                "set quantize.encoder to gptq"
            )
        if self.device == "cpu" and self.train.precision == "fp16":
            raise ValueError("train.precision fp16 needs a GPU, but device is cpu; use fp32 or bf16")
        return self
