#!/usr/bin/env bash
# Pin what .venv has now. Build tags (+cpu) are dropped, so that each machine takes its own build of torch.
set -euo pipefail
{
    echo "# Written by 'make lock'. Every package of .venv, pinned."
    .venv/bin/pip freeze --exclude-editable --exclude headrace | grep -v '^-e' | sed -E 's/\+[a-z0-9]+$//'
} > requirements.lock
