#!/usr/bin/env bash
# Starts the job as a Kubernetes Job: scripts/submit_k8s.sh --config job.yaml --image IMAGE -- --namespace voices
# The same again changes nothing while that Job is there, and other settings are refused. To run it again:
# kubectl delete job,configmap --selector app.kubernetes.io/instance=NAME
set -euo pipefail
# shellcheck source=scripts/submit.sh
. "$(dirname "$0")/submit.sh"

prepare k8s kubectl "$@"
kubectl apply --filename "$rendered" "${client[@]}"
