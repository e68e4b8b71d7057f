#!/usr/bin/env bash
# Lint, types and tests in one command; arguments go to pytest (scripts/check.sh -m "not slow").
set -euo pipefail
cd "$(dirname "$0")/.."

ruff format --check .
ruff check .
mypy
pytest "$@"
