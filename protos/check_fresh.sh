#!/usr/bin/env bash
# Fails when the committed stubs are not what the .proto generates.
set -euo pipefail
cd "$(dirname "$0")"
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
PATH=$(dirname "${PYTHON:-python}"):$PATH ./generate.sh "$fresh" 2>/dev/null
for stub in "$fresh"/nearkin/v1/*; do
  cmp "$stub" "nearkin/v1/$(basename "$stub")" || {
    echo "protos: the stubs are stale; run 'make stubs' and commit them" >&2
    exit 1
  }
done
echo "protos: stubs are fresh"
