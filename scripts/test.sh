#!/usr/bin/env bash
# Passes all tests on a fresh machine: sets everything up, then runs scripts/check.sh. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

SETUP_EXTRAS=dev
# shellcheck source=scripts/setup.sh
. scripts/setup.sh
scripts/build_llama_cpp.sh
scripts/fetch_offline_model.sh >/dev/null
exec scripts/check.sh "$@"
