#!/usr/bin/env bash
# Make the virtual environment: tools/setup-venv.sh PYTHON VENV run|all. `run`: what running needs; `all`: what building
# and testing need, too. Safe to run again.
set -euo pipefail
python=$1
venv=$2
what=$3
# uv, where there is one, takes a third of pip's time; where it can't get a package (it has settings of its own for
# mirrors), pip does. torch always comes by pip, which finds the build that a machine's own settings offer.
install() {
    if command -v uv >/dev/null && uv pip install -q --python "$venv/bin/python" "$@" 2>/dev/null; then return; fi
    "$venv/bin/pip" install --disable-pip-version-check -q "$@"
}
say() { printf '\033[1m== %s\033[0m\n' "$*"; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "Headrace needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1 || echo missing)."
    echo "Install one (Debian/Ubuntu: apt-get install python3 python3-venv) or name one: make PYTHON=python3.12 ..."
    exit 1
fi
if [ ! -x "$venv/bin/pip" ]; then
    say "creating $venv"
    if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
        rm -rf "$venv"
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            say "installing python3-venv"
            apt-get update -qq && apt-get install -y -qq python3-venv
            "$python" -m venv "$venv"
        else
            echo "Python's venv module is missing; install it first: sudo apt-get install python3-venv"
            exit 1
        fi
    fi
fi
# torch first and alone: a CPU build where one is offered, a CUDA build on a GPU machine.
say "installing torch (the large one)"
"$venv/bin/pip" install --disable-pip-version-check --progress-bar on -q "$(grep '^torch==' requirements.lock)"
if [ "$what" = run ]; then
    say "installing headrace and what running it needs, as pinned in requirements.lock"
    install -c requirements.lock hatchling editables
    install -c requirements.lock --no-build-isolation -e '.[worker]'
else
    say "installing what building and testing need, as pinned in requirements.lock"
    install -r requirements.lock
fi
say "ready"
