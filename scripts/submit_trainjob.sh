#!/usr/bin/env bash
# Starts the job as a Kubeflow TrainJob: scripts/submit_trainjob.sh --config job.yaml --image IMAGE -- --namespace voices
set -euo pipefail
# shellcheck source=scripts/submit.sh
. "$(dirname "$0")/submit.sh"

prepare trainjob kubectl "$@"
kubectl apply --filename "$rendered" "${client[@]}"
