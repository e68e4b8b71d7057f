"""A request for `aws sagemaker create-training-job --cli-input-json`
(https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTrainingJob.html).

Inputs in S3 become channels, the other settings hyperparameters. Checkpoints are the job's own copies in the output, so
there is no CheckpointConfig beside them.
"""

from __future__ import annotations

import json

from pipeline.errors import ConfigError
from pipeline.render import Job, as_text, refuse, require_buckets
from pipeline.render.pod import Object
from pipeline.storage import scheme_of

MACHINES = {0: "ml.m5.2xlarge", 1: "ml.g5.xlarge", 4: "ml.g5.12xlarge", 8: "ml.g5.48xlarge"}  # NVIDIA A10G (24 GB)
MAX_RETRIES = 30  # of MaximumRetryAttempts, which are for SageMaker's own failures
MAX_CHANNELS = 20
NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
STAGES = ("base", "tuned", "pruned", "recovered", "F16", "quantized", "finished")  # of the ledger
# What the log says, as CloudWatch metrics.
METRICS = {
    **{f"perplexity:{stage}": rf"evaluate: {stage}: perplexity {NUMBER}" for stage in STAGES},
    **{f"ratio:{stage}": rf"evaluate: {stage}: perplexity [0-9.]+, {NUMBER} times" for stage in STAGES},
    "recover:kl": rf"recover: step [0-9]+ of [0-9]+, validation KL {NUMBER}",
    "adapt:kl": rf"adapt: step [0-9]+ of [0-9]+, validation KL {NUMBER}",
    "finish:kl": rf"finish: step [0-9]+ of [0-9]+, validation KL {NUMBER}",
    "sparsity": rf"sparsify: share of zeros {NUMBER}",
    "megabytes": rf"quantize: \S+ {NUMBER} MB",
    "bits-a-weight": rf"quantize: \S+ [0-9.]+ MB, {NUMBER} bits a weight",
}


def render(job: Job) -> str:
    refuse(job, "SageMaker, where the instance type decides them,", "cpus", "memory_gib")
    require_buckets(job, "SageMaker", "s3")
    return json.dumps(training_job(job), indent=2, ensure_ascii=False) + "\n"


def training_job(job: Job) -> Object:
    request = job.request
    if not request.identity:
        raise ConfigError("SageMaker needs a role for the job; give its ARN with --identity")
    seconds = request.hours * 3600
    channels, settings = inputs_of(job)
    asked: Object = {
        "TrainingJobName": job.name,
        "AlgorithmSpecification": {
            "TrainingImage": request.image,
            "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": name, "Regex": regex} for name, regex in METRICS.items()],
        },
        "RoleArn": request.identity,
        "HyperParameters": settings,
        "OutputDataConfig": {"S3OutputPath": f"{job.settings['output'].rstrip('/')}/sagemaker"},
        "TensorBoardOutputConfig": {"S3OutputPath": f"{job.settings['output'].rstrip('/')}/tensorboard"},
        "ResourceConfig": {
            "InstanceType": instance(job),
            "InstanceCount": request.nodes,
            "VolumeSizeInGB": request.disk_gib,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": seconds},
        "RetryStrategy": {"MaximumRetryAttempts": min(max(request.starts - 1, 1), MAX_RETRIES)},
        "EnableNetworkIsolation": False,  # the job publishes to S3 itself
    }
    if channels:
        asked["InputDataConfig"] = channels
    if request.spot:
        asked["EnableManagedSpotTraining"] = True
        asked["StoppingCondition"]["MaxWaitTimeInSeconds"] = 2 * seconds
    return asked


def inputs_of(job: Job) -> tuple[list[Object], dict[str, str]]:
    """Channels, and the settings that are left. Globs and other buckets' URIs stay a setting."""
    settings = {key: as_text(value) for key, value in job.travelling().items()}
    inputs = job.settings.get("input", [])
    plain = all(scheme_of(uri) == "s3" and not set("*?[") & set(uri) for uri in inputs)
    if not inputs or not plain or len(inputs) > MAX_CHANNELS:
        return [], settings
    del settings["input"]
    return [channel(f"quotes-{number:02}", uri) for number, uri in enumerate(inputs)], settings


def channel(name: str, uri: str) -> Object:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File"}


def instance(job: Job) -> str:
    kind = job.request.machine or MACHINES.get(job.request.gpus)
    if kind is None:
        raise ConfigError(f"no instance with {job.request.gpus} GPUs is known; name one with --machine")
    return kind
