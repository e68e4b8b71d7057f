#!/usr/bin/env bash
# Lint, types and tests in one command; arguments go to pytest (scripts/check.sh -m "not slow"). The tests run in a
# process a core, at most four: each holds a model or two and up to 2 GiB. `pytest` alone runs them in one.
set -euo pipefail
cd "$(dirname "$0")/.."

ruff format --check .
ruff check .
mypy
pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
