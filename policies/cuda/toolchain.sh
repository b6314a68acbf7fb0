#!/usr/bin/env bash
# What the feature `cuda` needs to be built on a machine without a GPU or CUDA toolkit, in FOLDER:
#
#     policies/cuda/toolchain.sh FOLDER [--compiler] && . FOLDER/env && cargo build --release --features cuda
#
# FOLDER/home takes the place of a toolkit (CUDA_HOME). Its libraries look for the real ones when they are first used
# (loader.c), so what is linked with them starts anywhere and says what is missing when a GPU is asked for. With
# `--compiler` the kernels are compiled, by NVIDIA's compiler from the Python package registry (about 300 MB); without it
# modules stay empty, for checking the Rust and for the simulator. candle's kernels for quantized weights and mixtures of
# experts take minutes to compile and are called by nothing here: they are left out, and end the program if they are
# called all the same. With a toolkit of your own (CUDA 13, nvcc on the PATH) none of this is needed.
set -euo pipefail
[[ $(uname -m) == x86_64 ]] || { echo "x86-64 alone; elsewhere install NVIDIA's toolkit" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
home=$folder/home
mkdir -p "$home/bin" "$home/lib64" "$home/include"

# The folder of a crate that the workspace depends on.
crate() {
  (cd "$here" && cargo metadata --format-version 1 --features cuda) |
    python3 -c 'import json, os, sys
print(next(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == sys.argv[1]))' "$1"
}
cudarc=$(crate cudarc)

# library NAME ABSENT REMEDY SONAME...: a jump through a slot for each function that cudarc declares.
library() {
  local name=$1 absent=$2 remedy=$3 source=$folder/$1.s
  shift 3
  {
    printf '.data\n.balign 8\nlibrary_%s: .quad names, remedy\n.long %s\n.balign 8\n.quad 0\n.long 0\n.balign 8\n' "$name" "$absent"
    grep -ohE '\bfn (cu|cublas|cublasLt|curand|nvrtc)[A-Z][A-Za-z0-9_]+' "$cudarc/src/${name,,}/sys/mod.rs" | sort -u | while read -r _ function; do
      printf '.data\nslot_%s: .quad first_%s\n.text\n.globl %s\n.type %s, @function\n%s: jmp *slot_%s(%%rip)\nfirst_%s:\n' \
        "$function" "$function" "$function" "$function" "$function" "$function" "$function"
      printf '    leaq text_%s(%%rip), %%r11\n    pushq %%r11\n    leaq slot_%s(%%rip), %%r11\n    pushq %%r11\n' "$function" "$function"
      printf '    leaq library_%s(%%rip), %%r10\n    jmp grpo_cuda_first_call\n' "$name"
      printf '.section .rodata\ntext_%s: .asciz "%s"\n' "$function" "$function"
    done
    printf '.section .rodata\nremedy: .asciz "%s"\nnames: ' "$remedy"
    for soname in "$@"; do printf '.asciz "%s"\n' "$soname"; done
    printf '.byte 0\n.section .note.GNU-stack,"",@progbits\n'
  } >"$source"
  as "$source" -o "$folder/$name.o"
  rm -f "$home/lib64/lib${name}.a"
}
wheels="python3 -m pip install nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35"
library driver 100 "install NVIDIA's driver (580 or newer)" libcuda.so.1
library cublas 1 "$wheels" libcublas.so.13
library cublaslt 1 "$wheels" libcublasLt.so.13
library curand 203 "$wheels" libcurand.so.10
library nvrtc 1 "python3 -m pip install nvidia-cuda-nvrtc==13.0.88" libnvrtc.so.13
gcc -O2 -fPIC -Wall -Wextra -Werror -fvisibility=hidden -c "$here/loader.c" -o "$folder/loader.o"
archive() { rm -f "$home/lib64/$1" && ar rcs "$home/lib64/$1" "${@:2}"; }
archive libcuda.a "$folder/driver.o" "$folder/loader.o"
archive libcublas.a "$folder/cublas.o"
archive libcublasLt.a "$folder/cublaslt.o"
archive libcurand.a "$folder/curand.o"
archive libnvrtc.a "$folder/nvrtc.o"
archive libcudart.a

# What candle's own library of kernels would export.
kernels=$(crate candle-kernels)
grep -oE '\bfn [A-Za-z0-9_]+' "$kernels/src/ffi.rs" | awk '{ print "void " $2 "(void) { abort(); }" }' | sort -u |
  cat <(echo '#include <stdlib.h>') - >"$folder/left_out.c"
gcc -fPIC -c "$folder/left_out.c" -o "$folder/left_out.o"
echo | gcc -x c -c - -o "$folder/empty.o"

if [[ ${2:-} == --compiler ]]; then
  [[ -x $folder/py/nvidia/cu13/bin/nvcc ]] || python3 -m pip install --quiet --no-deps --disable-pip-version-check \
    --upgrade --target "$folder/py" nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96 nvidia-curand==10.4.0.35
  cp -rsf "$folder/py/nvidia/cu13/include/." "$home/include/"
fi
install -m 755 "$here/nvcc.sh" "$home/bin/nvcc"

# The least card that has bf16 on tensor cores; later ones take the same modules. Builds without a compiler have another
# number, so that none of their empty modules is taken for a compiled one.
least=75
if [[ -x $folder/py/nvidia/cu13/bin/nvcc ]]; then least=80; fi
cat >"$folder/env" <<ENV
export CUDA_HOME='$home' CUDA_PATH='$home' CUDA_ROOT='$home' CUDA_TOOLKIT_ROOT_DIR='$home' NVCC='$home/bin/nvcc'
export CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-$least}
ENV
echo "$folder/env"
