#!/usr/bin/env bash
# Builds the image with docker, podman or buildah, whichever is there: scripts/build_image.sh
# Arguments go to the builder: scripts/build_image.sh --target with-model --tag registry/quotesmith:gpt2
#
#   VARIANT     cuda (default), or cpu: torch without CUDA
#   BUILDER     docker, podman or buildah
#   PIP_CONFIG  a pip.conf for the build, which the image never has: mirrors, credentials, certificates
#   INDEX_URL, EXTRA_INDEX_URL, BASE, BUILD_BASE, PYTHON_VERSION, LLAMA_CPP_FLAGS, BASE_MODEL, BASE_REVISION, HF_ENDPOINT:
#               the Dockerfile's arguments of these names
set -euo pipefail
cd "$(dirname "$0")/.."

find_builder() {
  local candidate
  for candidate in ${BUILDER:-docker podman buildah}; do
    # docker's program is often there without its service
    if command -v "$candidate" >/dev/null && "$candidate" info >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "build: no ${BUILDER:-docker, podman or buildah} that works was found" >&2
  return 1
}

builder=$(find_builder)
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
if [ "$revision" != unknown ] && [ -n "$(git status --porcelain)" ]; then
  revision=$revision-dirty
fi

variant=${VARIANT:-cuda}
suffix=
if [ "$variant" = cpu ]; then
  suffix=-cpu
  # where torch's CPU wheels are, unless it is set, to nothing too; the lock's hashes hold wherever they come from
  EXTRA_INDEX_URL=${EXTRA_INDEX_URL-https://download.pytorch.org/whl/cpu}
fi

previous=
for word in "$@"; do   # another target is another image
  case $previous:$word in
    --target:*) suffix=$suffix-$word ;;
    *:--target=*) suffix=$suffix-${word#--target=} ;;
  esac
  previous=$word
done

arguments=(--build-arg "VARIANT=$variant" --build-arg "VERSION=$version" --build-arg "REVISION=$revision")
for name in INDEX_URL EXTRA_INDEX_URL BASE BUILD_BASE PYTHON_VERSION LLAMA_CPP_FLAGS BASE_MODEL BASE_REVISION \
  HF_ENDPOINT; do
  if [ -n "${!name:-}" ]; then
    arguments+=(--build-arg "$name=${!name}")
  fi
done

if [ -n "${PIP_CONFIG:-}" ]; then
  arguments+=(--secret "id=pip,src=$PIP_CONFIG")
fi
export BUILDAH_LAYERS=${BUILDAH_LAYERS:-true}   # buildah forgets every step otherwise

echo "build: quotesmith:$version$suffix ($variant) at ${revision:0:12} with $builder" >&2
"$builder" build --file Dockerfile --tag "quotesmith:$version$suffix" "${arguments[@]}" "$@" .
