#!/usr/bin/env bash
# Writes scripts/image/*.lock, what the image installs: the versions of requirements.lock with the hashes of their files.
# Needs uv (pip install uv). CPU_WHEELS: a folder or index with torch's CPU wheels.
set -euo pipefail
cd "$(dirname "$0")/.."

# triton compiles kernels as a job runs, for which it needs a C compiler that the image does not have: what finds it
# (torch's own replacements of some operators) would fail. Without it they are not tried. 721 MB.
compile() {
  uv pip compile pyproject.toml --extra s3 --constraint requirements.lock --generate-hashes --quiet \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --no-emit-package triton "$@"
}

note='# Made by scripts/update_image_locks.sh'
cuda=$(compile)
printf '%s\n%s\n' "$note" "$cuda" >scripts/image/cuda.lock

torch=$(sed -n 's/^torch==//p' requirements.lock)
override=$(mktemp)
trap 'rm -f "$override"' EXIT
echo "torch==$torch+cpu" >"$override"
cpu=$(compile --override "$override" --find-links "${CPU_WHEELS:-https://download.pytorch.org/whl/cpu/torch/}")
printf '%s\n%s\n' "$note" "$cpu" >scripts/image/cpu.lock
