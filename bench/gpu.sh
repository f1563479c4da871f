#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, torch >= 2.11, nvcc, pybind11, setuptools >= 77, pytest, pytest-benchmark, and for all
# tests hypothesis, scipy, matplotlib and what the extra [train] brings; needs no network, and no virtual environment
# where pip installs without one:
#   bench/gpu.sh build    compiles for the GPUs that are there, or those of FASTPROTO_CUDA_ARCHS, and installs
#   bench/gpu.sh test [options]     the tests marked gpu, on twelve processes where pytest-xdist is installed, as some
#                                   400 kernels are compiled; options of pytest, as -k contrast
#   bench/gpu.sh bench [options]    the benchmarks of the GPU; JSON goes to bench/results/GPU-NAME/
#   bench/gpu.sh train DATA [options]    bench/table.py: every method with every crop; goes on when repeated; wants the
#                                        packages of the extra [train] too, of which jsonargparse is seldom there
# Each part takes minutes, and is interrupted after LIMIT_S seconds, or nine minutes: what was measured until then is
# kept. PYTHON names the interpreter that holds torch, FASTPROTO_COMMIT the commit of a tree without .git. Where OUT
# names a folder, test, bench and train copy bench/results/GPU-NAME to $OUT/GPU-NAME, and what they print is in
# $OUT/PART.log too.
set -euo pipefail
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  OUT=$(realpath "$OUT")
fi
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
part=${1:-}

limited() { timeout --foreground --signal INT --kill-after 20 "${LIMIT_S:-540}" "$PYTHON" "$@"; }
installed() { "$PYTHON" -c "import $1" 2> /dev/null; }

archs() {  # "90" of "9.0"; several as "80;90"
  local versions
  versions=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | grep -xE '[0-9]+\.[0-9]+') || versions=9.0
  tr -d . <<< "$versions" | sort -nu | paste -sd ';'
}

run() {
  local options=()
  case "$part" in
    build)
      export FASTPROTO_CUDA=1 FASTPROTO_CUDA_ARCHS=${FASTPROTO_CUDA_ARCHS:-$(archs)}
      # A module compiled into the tree would go before the one that is installed.
      rm -f _fastproto_*.so
      limited -m pip install --no-build-isolation --no-deps --force-reinstall .
      limited -m fastproto info
      ;;
    test)
      if installed pytest_timeout; then options+=(--timeout 120); fi
      if installed xdist; then
        # Two files have most of the kernels: tests, not files, are shared out. What waits for a kernel that never ends
        # hears no signal: the thread of pytest-timeout ends its process, and another takes over the tests that are left.
        options+=(--numprocesses 12 --dist worksteal)
        if installed pytest_timeout; then options+=(--timeout-method thread); fi
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
      fi
      limited -m pytest tests -q -m gpu --continue-on-collection-errors --durations 10 "${options[@]}" "$@"
      ;;
    bench) limited -m pytest bench -q -s -m gpu --benchmark-only --continue-on-collection-errors "$@" ;;
    # The script takes the checkout's Python, as pytest does, and the modules that build installed.
    train) PYTHONPATH=$PWD limited bench/table.py --minutes 8.5 "$@" ;;
  esac
}

keep() {
  shopt -s nullglob
  for folder in bench/results/nvidia-*; do cp -r "$folder" "$OUT"; done
}

case "$part" in
  build) run ;;
  test | bench | train)
    shift
    if [ -z "${OUT:-}" ]; then
      run "$@"
    else
      trap keep EXIT
      run "$@" 2>&1 | tee -i "$OUT/$part.log"
    fi
    ;;
  *) sed -n '2,14p' "$0"; exit 2 ;;
esac
