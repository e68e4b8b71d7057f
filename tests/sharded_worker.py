"""A training process that has its share of the model although it has no GPU. accelerate knows FSDP for GPUs only; here
it is told that the CPUs are some, and everything else is as on GPUs: FSDP, the Trainer, the checkpoints."""

import logging
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState

from pipeline import sharding
from pipeline.team import worker

whole_model = sharding.whole_model


def told(model):
    logging.getLogger(__name__).info("weights are kept as %s", {type(each).__name__ for each in model.parameters()})
    return whole_model(model)


PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_XPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
sharding.whole_model = told
worker.main(Path(sys.argv[1]))
