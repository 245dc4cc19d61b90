#!/usr/bin/env bash
# Regenerates the committed stubs. The generator is an older one on purpose: what it writes sets the floor of the
# protobuf and grpcio versions that users need (pinned in constraints.txt, declared in pyproject.toml).
#   generate.sh [OUT_DIR]     default: beside the .proto
set -euo pipefail
cd "$(dirname "$0")"
out=${1:-.}
mkdir -p "$out"
${PYTHON:-python} -m grpc_tools.protoc -I. --python_out="$out" --grpc_python_out="$out" \
  --mypy_out="$out" --mypy_grpc_out="$out" nearkin/v1/neighbours.proto
