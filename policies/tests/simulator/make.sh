#!/usr/bin/env bash
# CUDA's driver and cuBLAS made of this machine's C++ compiler, in FOLDER, for tests without a GPU:
#
#     policies/cuda/toolchain.sh target/cuda && . target/cuda/env
#     policies/tests/simulator/make.sh target/cuda/simulated
#     GRPO_CUDA_LIBRARIES=$PWD/target/cuda/simulated cargo test -p grpo-policies --features cuda
#
# They run the kernels of policies/src/cuda/kernels and candle.cu's, and know no others: see simulator.hpp.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
kernels=$here/../../src/cuda/kernels
flags=(-std=c++17 -O2 -g -fPIC -DGRPO_SIMULATED -I"$here" -I"$kernels" -Wall -Wextra -Werror -Wno-unused-parameter
  -fsanitize=alignment -fno-sanitize-recover=alignment -fsanitize-undefined-trap-on-error)
table() {
  printf '#include "table.hpp"\n'
  for source in "$@"; do printf '#include "%s"\n' "$source"; done
  printf 'extern const Kernel kernel_table[] = {\n'
  for source in "$@"; do
    # Names are what is left of macros, so they are read behind the preprocessor.
    g++ "${flags[@]}" -DGRPO_KERNEL_NAMES -x c++ -E "$source" 2>/dev/null |
      grep -oE '__global__ void +[a-z0-9_]+\(' |
      sed -E 's/.* ([a-z0-9_]+)\(/    {"\1", Bind<\1>::bind},/'
  done
  printf '};\nextern const size_t n_kernels = sizeof kernel_table / sizeof *kernel_table;\n'
}
table "$kernels/kernels.cu" "$here/candle.cu" >"$folder/table.cpp"
g++ "${flags[@]}" -c "$folder/table.cpp" -o "$folder/table.o" &
g++ "${flags[@]}" -c "$here/fibers.cpp" -o "$folder/fibers.o"
g++ "${flags[@]}" -c "$here/driver.cpp" -o "$folder/driver.o"
wait
# Its own names before those of other libraries: the C library has an `advance` too.
g++ -shared -Wl,-Bsymbolic -o "$folder/libsimulated.so" "$folder"/{table,fibers,driver}.o
for name in libcuda.so.1 libcublas.so.13 libcublasLt.so.13 libcurand.so.10 libnvrtc.so.13; do
  ln -sf libsimulated.so "$folder/$name"
done
