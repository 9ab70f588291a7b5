#!/usr/bin/env bash
# Pin what .venv has now. Build tags (+cpu) are dropped, so that each machine takes its own build of torch. setuptools stays:
# torch asks for it, and from Python 3.12 on a new environment has none. What only some platforms have gets a marker; the
# others of these packages' markers hold wherever Headrace runs. No hashes: CONTRIBUTING.md says why.
set -euo pipefail
{
    echo "# Written by 'make lock'. Every package of .venv, pinned."
    .venv/bin/pip freeze --all --exclude-editable --exclude headrace --exclude pip --exclude wheel | grep -v '^-e' |
        sed -E -e 's/\+[a-z0-9]+$//' \
            -e '/^triton==/s/$/ ; sys_platform == "linux"/' \
            -e '/^hf-xet==/s/$/ ; platform_machine in "x86_64 amd64 AMD64 arm64 ARM64 aarch64"/'
} > requirements.lock
