#!/usr/bin/env bash
# Build in place, GPU tests, compute-sanitizer, timing table and times to first token on a machine with a GPU, within
# nine minutes.
#   bench/gpu_check.sh                      everything; results in ${OUT:-bench/results}, a short table last on stdout
#   bench/gpu_check.sh --more               the long measurements instead, within nine minutes again
#   bench/gpu_check.sh --only build,timing  some parts
# No network is needed, and nothing but the machine's own torch, Transformers, Triton, nvcc, pytest and build tools: see
# bench/gpu_check.py.
# Exit status: 0 all passed, 1 a part failed or ran out of time, 2 something is missing here.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "gpu_check: missing here: $python" >&2; exit 2; }
unset TRITON_INTERPRET SPECPREFILL_EMULATION SPECPREFILL_BUILD # the kernels are to run on the GPU, all of them
exec "$python" -m bench.gpu_check "$@"
