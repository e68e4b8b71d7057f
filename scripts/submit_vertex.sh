#!/usr/bin/env bash
# Starts the job on Vertex AI: scripts/submit_vertex.sh --config job.yaml --image IMAGE -- --region us-central1
set -euo pipefail
# shellcheck source=scripts/submit.sh
. "$(dirname "$0")/submit.sh"

prepare vertex gcloud "$@"
gcloud ai custom-jobs create --display-name "quotesmith-$(date -u +%m%d%H%M%S)" --config "$rendered" "${client[@]}"
