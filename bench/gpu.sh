#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, torch >= 2.11 and nvcc; needs no network and no virtual environment:
#   bench/gpu.sh build    compiles for the GPUs of FASTPROTO_CUDA_ARCHS and installs in place
#   bench/gpu.sh test     the tests marked gpu
#   bench/gpu.sh bench    the benchmarks of the GPU; JSON goes to bench/results/GPU-NAME/
#   bench/gpu.sh train DATA [options]    nine minutes of bench/table.py: every method with every crop; goes on when repeated
# Each part takes minutes. PYTHON names the interpreter that holds torch.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

case "${1:-}" in
  build) FASTPROTO_CUDA=1 "$PYTHON" -m pip install --no-build-isolation --no-deps --force-reinstall . && "$PYTHON" -m fastproto info ;;
  test) "$PYTHON" -m pytest tests -q -m gpu --continue-on-collection-errors --durations 10 ;;
  bench) "$PYTHON" -m pytest bench -q -s -m gpu --benchmark-only --continue-on-collection-errors ;;
  train) shift; "$PYTHON" bench/table.py "$@" ;;
  *) sed -n '2,7p' "$0"; exit 2 ;;
esac
