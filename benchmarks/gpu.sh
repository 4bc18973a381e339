#!/usr/bin/env bash
# The GPU rows of the benchmarks, in one command and less than ten minutes; results/bench/gpu-*.json.
# Usage: benchmarks/gpu.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
"$python" -c 'import torch; assert torch.cuda.is_available(), "There is no CUDA device here."'
run() { local name=$1; shift; timeout 150 "$python" -m "benchmarks.$name" --device cuda --out "results/bench/gpu-$name.json" "$@"; }
run forward --dtype bfloat16 --side 64 --text-tokens 300 --repeats 20
run generation --dtype bfloat16 --xl-layers 28 --xl-side 64 --xl-steps 14 --repeats 5
run caching --repeats 5
run sweep --steps 0 4 9 --repeats 2
run scaling --workers --repeats 5
