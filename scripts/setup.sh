# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment in .venv with the locked dependencies, made once and made
# anew when they change. SETUP_EXTRAS names extras of pyproject.toml ("dev").
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "setup: found no Python 3.11 or newer; install one (Debian, Ubuntu: apt-get install python3 python3-venv)" >&2
  return 1
}

make_environment() {
  local python stamp
  python=$(find_python)
  # The name with the extras begins with the name without them: what has more serves for less.
  stamp=.venv/.installed-$(cat pyproject.toml requirements.lock | sha256sum | cut -c1-16)${SETUP_EXTRAS:+-$SETUP_EXTRAS}
  if ! compgen -G "$stamp*" >/dev/null; then
    echo "setup: installing the dependencies into .venv (log: .venv/install.log)" >&2
    [ -x .venv/bin/pip ] || "$python" -m venv --clear .venv || {
      echo "setup: $python cannot make a virtual environment; install its venv module (apt-get install python3-venv)" >&2
      return 1
    }
    .venv/bin/pip install --constraint requirements.lock --editable ".${SETUP_EXTRAS:+[$SETUP_EXTRAS]}" \
      >.venv/install.log 2>&1 || {
      tail -n 20 .venv/install.log >&2
      echo "setup: pip could not install the dependencies; the lines above and .venv/install.log say why" >&2
      return 1
    }
    touch "$stamp"
  fi
  # shellcheck disable=SC1091
  . .venv/bin/activate
  PYTHON=$PWD/.venv/bin/python
  export PYTHON
}

make_environment
