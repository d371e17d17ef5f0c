#!/usr/bin/env bash
# Everything that needs a GPU, for a machine with one, torch, nvcc and a C++ compiler: build, tests, compute-sanitizer,
# benchmark. Every part has a limit, reports its status, and the rest goes on.
#   tests/gpu.sh [FOLDER]      writes logs and results there (default: gpu-results)
# A wheel that was built elsewhere (NEARFAR_WHEEL=FILE) saves the minutes of the build. A folder of wheels
# (NEARFAR_PEERS=FOLDER) brings libraries that the benchmark compares with to a machine without a network.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
mkdir -p "${1:-gpu-results}"
out=$(cd "${1:-gpu-results}" && pwd)
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1
failed=()

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  printf '%-22s status %3d  %4d s   %s\n' "$name" "$status" "$((SECONDS - begin))" "$(tail -n 1 "$out/$name.log")" |
    tee -a "$out/summary.txt"
  if [ "$status" -ne 0 ]; then failed+=("$name"); fi
}

: >"$out/summary.txt"
nvidia-smi >"$out/nvidia-smi.log" 2>&1
capability=$("$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))' 2>/dev/null)
case $capability in 90 | "") architecture=90a-real ;; *) architecture=$capability-real ;; esac
if [ -n "${NEARFAR_WHEEL:-}" ]; then
  part build 60 "$python" -m pip install --no-deps --force-reinstall "$NEARFAR_WHEEL"
else
  part build 240 env NEARFAR_CUDA=ON CUDAARCHS="$architecture" CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" \
    "$python" -m pip install --no-build-isolation --no-deps -C cmake.define.NEARFAR_LEVELS=v3 .
fi
if [ -n "${NEARFAR_PEERS:-}" ]; then
  part peers 60 "$python" -m pip install --no-index --no-deps "$NEARFAR_PEERS"/*.whl
fi

# Away from the sources, so that the installed package is what is imported.
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
cp -r tests pyproject.toml "$run/"
cd "$run"
part tests 150 "$python" -m pytest -q --maxfail=20 -p no:cacheprovider tests/test_cuda.py tests/test_cuda_losses.py tests/test_cuda_float16.py tests/test_cuda_kernels.py tests/test_cuda_points.py tests/test_cuda_nearest.py tests/test_cuda_statistics.py tests/test_cuda_cupy.py -k "not million"
part million-rows 45 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k million
if [ "$capability" = 90 ]; then
  # Scores of float32 rows on the tensor cores: right first, then both paths side by side.
  part split-tests 60 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_split.py
  part split-times 60 "$python" tests/gpu_split.py
  # Is it faster to multiply during epilogues? If so it becomes the default in plan.hpp.
  part overlap-tests 30 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_overlap.py
  part overlap-times 60 bash -c "nvcc -std=c++17 --expt-relaxed-constexpr -O3 -arch=sm_90a -I '$root/csrc' -o overlap \
    '$root/bench/cuda/overlap.cu' && ./overlap"
fi
part bench 240 "$python" -m nearfar bench --device cuda --budget 0.3 --json "$out/bench.json"
# Beside the lines of bfloat16: float16 takes the same kernels.
part bench-float16 60 "$python" -m nearfar bench --device cuda --budget 0.3 --json "$out/bench-float16.json" \
  --dtype float16 --ops 'info_nce,nt_xent,siglip,sup_con,uniformity'

small="(info_nce or clip or nt_xent or uniformity or alignment or cdist or matmul or knn or kmeans)"
small="$small and (37-16 or 65-33 or 5-66-3 or 65-16-2 or 40-3 or 33 or kmeans) and not float64"
# initcheck does not see what the bulk copy engine writes, which on Hopper is the products of weights of 16-bit rows.
for tool in memcheck racecheck synccheck initcheck; do
  if command -v compute-sanitizer >/dev/null; then
    part "sanitizer-$tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -x -p no:cacheprovider tests/test_cuda.py \
      -k "$small$([ "$tool" = initcheck ] && echo ' and not float16')"
    if [ "$capability" = 90 ] && [ "$tool" != initcheck ]; then
      # Kernels of Hopper alone: three products of tf32, wide tiles with weights of float16.
      part "sanitizer-$tool-90" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
        --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider tests/test_cuda_split.py tests/test_cuda_float16.py \
        tests/test_cuda_overlap.py -k "neighbours and 5 or gaussian_matmul or temperatures and not views or sup_con or many_tiles"
    fi
  else
    echo "sanitizer-$tool: SKIPPED, no compute-sanitizer on PATH" | tee -a "$out/summary.txt"
  fi
done

cat "$out/bench.log" "$out/bench-float16.log"
if [ "$capability" = 90 ]; then cat "$out/split-times.log" "$out/overlap-times.log"; fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
