#!/usr/bin/env bash
# Starts the job on SageMaker: scripts/submit_sagemaker.sh --config job.yaml --image IMAGE --identity ROLE_ARN -- --region R
# Names of training jobs are used once, so the time is added.
set -euo pipefail
# shellcheck source=scripts/submit.sh
. "$(dirname "$0")/submit.sh"

prepare sagemaker aws "$@"
name=$(sed -n 's/^  "TrainingJobName": "\(.*\)",$/\1/p' "$rendered")
aws sagemaker create-training-job --cli-input-json "file://$rendered" \
  --training-job-name "$name-$(date -u +%m%d%H%M%S)" "${client[@]}"
