#!/usr/bin/env bash
# The GPU rows of the benchmarks; see gpu.py. Usage: benchmarks/gpu.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${1:-.venv/bin/python}" -m benchmarks.gpu
