#!/usr/bin/env bash
# Generate the Python wire code into the folder named by the first argument.
set -euo pipefail
out=$1
rm -rf "$out"
mkdir -p "$out"
python -m grpc_tools.protoc -Iprotos --python_out="$out" --mypy_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" protos/headrace/v1/*.proto
touch "$out/headrace/__init__.py" "$out/headrace/v1/__init__.py" "$out/headrace/py.typed"
