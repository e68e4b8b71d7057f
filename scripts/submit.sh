# shellcheck shell=bash
# Sourced by submit_*.sh: renders the job into a file that goes away again. What stands before a `--` goes to
# `quotesmith render`, what stands after it to the platform's client.

# prepare PLATFORM CLIENT ARGUMENTS: sets `rendered`, the file, and `client`, the client's arguments.
prepare() {
  local platform=$1 program=$2
  shift 2
  if ! command -v "$program" >/dev/null; then
    echo "submit: $program is not installed; \`quotesmith render $platform\` prints what it would be given" >&2
    exit 69
  fi
  local ours=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    ours+=("$1")
    shift
  done
  [ $# -eq 0 ] || shift
  # shellcheck disable=SC2034
  client=("$@")
  rendered=$(mktemp)
  trap 'rm -f "$rendered"' EXIT
  entrypoint render "$platform" "${ours[@]}" >"$rendered"
}

# quotesmith's command line: from the environment of scripts/setup.sh, or installed.
entrypoint() {
  local beside
  beside=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/quotesmith
  if [ -x "$beside" ]; then
    "$beside" "$@"
  else
    quotesmith "$@"
  fi
}
