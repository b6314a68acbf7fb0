#!/usr/bin/env bash
# Everything that wants a card, built on a machine without one and run on one with:
#
#     experiments/benches/gpu.sh build    # here: kernels, tests and benches with the feature `cuda`, into target/gpu
#     experiments/benches/gpu.sh run      # there: kernels against the CPU, then the benches and PyTorch; target/gpu travels
#     experiments/benches/gpu.sh run test # there: one part of it, of test, draw, train, adamw, step and peer
#     experiments/benches/gpu.sh dry      # here: the same on the simulator, at small sizes
#
# `run` needs NVIDIA's driver, the libraries of a CUDA 13 build of torch, and nothing that Rust would need; it writes
# $OUT/card.md, or target/gpu/card.md where OUT is not set.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
carried=$root/target/gpu
cd "$root"

# The program of a `cargo --message-format=json` that has this name.
executable() {
  python3 -c 'import json, sys
found = [m["executable"] for m in map(json.loads, sys.stdin)
         if m.get("executable") and m.get("target", {}).get("name") == sys.argv[1]]
print(found[-1])' "$1"
}

# build PROFILE: the test of the kernels and the bench.
build() {
  mkdir -p "$carried"
  cp "$(cargo test --profile "$1" -p grpo-policies --features cuda --test cuda --no-run --message-format=json | executable cuda)" \
    "$carried/cuda"
  cp "$(cargo bench --profile "$1" -p grpo-experiments --features cuda --bench card --no-run --message-format=json | executable card)" \
    "$carried/card"
  strip "$carried/cuda" "$carried/card"
  cp experiments/benches/peers/card.py "$carried/"
}

case ${1:-} in
  build)
    policies/cuda/toolchain.sh target/cuda --compiler
    . target/cuda/env
    build release
    # A build without kernels would only be noticed there.
    grep -q '.entry attend_64_bf16' "$carried/cuda" && grep -q '.entry attend_64_bf16' "$carried/card"
    ls -l "$carried"
    ;;
  run)
    libraries=$(python3 -c 'import glob, os, torch
print(":".join(glob.glob(os.path.join(os.path.dirname(torch.__path__[0]), "nvidia", "*", "lib"))))')
    export GRPO_CUDA_LIBRARIES=$libraries LD_LIBRARY_PATH=$libraries:${LD_LIBRARY_PATH:-}
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    report=${OUT:-$carried}/card.md failed=0
    # What fails does not keep the rest from being measured; each part fits a call of ten minutes.
    for part in ${2:-test draw train adamw step peer}; do
      case $part in
        test) "$carried/cuda" --test-threads 1 ;;
        peer) python3 "$carried/card.py" | tee -a "$report" ;;
        *) "$carried/card" "$part" | tee -a "$report" ;;
      esac || failed=1
    done
    exit $failed
    ;;
  dry)
    policies/cuda/toolchain.sh target/cuda
    . target/cuda/env
    policies/tests/simulator/make.sh target/cuda/simulated
    export GRPO_CUDA_LIBRARIES=$root/target/cuda/simulated
    build dev
    "$carried/cuda" --test-threads 1
    "$carried/card" --small
    ;;
  *)
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
