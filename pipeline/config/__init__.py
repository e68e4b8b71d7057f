"""Every setting of a job, in one typed model, a file for each part of the walk. Flags, environment names, YAML keys,
`--help` and the README table are made from it (`settings.py`); stages receive only their own section."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.judging import SAMPLING, EvaluateConfig, GateConfig, PublishConfig
from pipeline.config.running import LeaseConfig, NodesConfig, ResumeConfig
from pipeline.config.section import ReleaseName, Section
from pipeline.config.shrinking import (
    AdaptConfig,
    CalibrationConfig,
    ExportConfig,
    FinishConfig,
    QuantizeConfig,
    RecoverConfig,
    SparsityConfig,
)
from pipeline.config.tuning import (
    BASE_MODEL,
    BASE_REVISION,
    DEFAULT_FILES,
    DataConfig,
    FourbitConfig,
    ModelConfig,
    TokensConfig,
    TrainConfig,
)

__all__ = [
    "BASE_MODEL",
    "BASE_REVISION",
    "DEFAULT_FILES",
    "SAMPLING",
    "AdaptConfig",
    "CalibrationConfig",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinishConfig",
    "FourbitConfig",
    "GateConfig",
    "JobConfig",
    "LeaseConfig",
    "ModelConfig",
    "NodesConfig",
    "PublishConfig",
    "QuantizeConfig",
    "RecoverConfig",
    "ResumeConfig",
    "SparsityConfig",
    "TokensConfig",
    "TrainConfig",
]


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
    tensorboard: str = Field(
        "", description="A folder or a gs:// or s3:// prefix for TensorBoard's files of the training, when it is done."
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
    adapt: AdaptConfig = AdaptConfig()
    finish: FinishConfig = FinishConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    publish: PublishConfig = PublishConfig()
    resume: ResumeConfig = ResumeConfig()
    lease: LeaseConfig = LeaseConfig()
    nodes: NodesConfig = NodesConfig()

    @property
    def adapting(self) -> bool:
        """Whether matrices are left to `adapt`, as far as the settings say: some files have none for it."""
        return self.adapt.steps > 0 and self.quantize.encoder == "gptq" and not self.sparsity.keep_zeros

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
        if self.train.sharding == "full" and self.train.select_best:
            raise ValueError(
                "train.select_best cannot keep the best epoch of a model in shares; set train.sharding to none"
            )
        if self.train.sharding == "full" and (self.device == "cpu" or self.train.method != "full"):
            raise ValueError(
                "train.sharding full splits all weights of a model over several GPUs; it needs train.method full and "
                "device auto or cuda"
            )
        return self
