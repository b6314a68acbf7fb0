#!/usr/bin/env bash
# In place of nvcc, as toolchain.sh installs it: modules by the real compiler where it was fetched, and an empty one where
# not; libraries of kernels that are left out by nobody.
set -euo pipefail
folder=$(cd "$(dirname "$0")/../.." && pwd)
compiler=$folder/py/nvidia/cu13/bin/nvcc
kind=object out= directory=. source=
arguments=("$@")
while [[ $# -gt 0 ]]; do
  case $1 in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;;
    --list-gpu-code) printf 'sm_80\nsm_90\n'; exit ;;
    --lib) kind=library ;;
    --ptx) kind=module ;;
    -o) out=$2; shift ;;
    --output-directory) directory=$2; shift ;;
    *.cu) source=$1 ;;
  esac
  shift
done
case $kind in
  library) rm -f "$out"; ar rcs "$out" "$folder/left_out.o" ;;
  object) cp "$folder/empty.o" "$out" ;;
  module)
    if [[ -x $compiler ]]; then exec "$compiler" "${arguments[@]}"; fi
    echo "// no compiler was fetched" >"${out:-$directory/$(basename "${source%.cu}").ptx}"
    ;;
esac
