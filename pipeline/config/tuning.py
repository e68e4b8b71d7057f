"""From text to tuned model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import NonEmpty, Section, Share

DEFAULT_FILES = ("kanye-quotes.txt", "trump-quotes.txt")
BASE_MODEL = "openai-community/gpt2"
BASE_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # the hub's main since 2024-02-19; pinned: main can move


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
    accumulation: int = Field(
        4, ge=1, description="Batches whose gradients are added up for one step, by all devices together."
    )
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
    sharding: Literal["none", "full"] = Field(
        "none",
        description="none: each GPU holds the whole model (DDP). full: weights, gradients and optimizer are split over "
        "all GPUs (FSDP), for models that one cannot hold.",
    )


class FourbitConfig(Section):
    """Loading the tuned model in 4 bits."""

    enabled: bool = Field(True, description="Load the tuned model back with bitsandbytes NF4 and measure it.")
