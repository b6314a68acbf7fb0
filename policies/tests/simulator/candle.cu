// Those of candle's own kernels that grpo's device path calls, written from their behaviour: numbers are filled, copied,
// widened and narrowed, and rows are chosen.
#include "real.cuh"

namespace {
// Where element `at` of a tensor of these sizes and strides lies; info is sizes, then strides, or null where contiguous.
size_t place(size_t at, size_t n_dims, const size_t *info) {
    if (!info) return at;
    size_t to = 0;
    for (size_t dim = n_dims; dim-- > 0;) {
        to += at % info[dim] * info[n_dims + dim];
        at /= info[dim];
    }
    return to;
}
#define FOR_ALL(at, n) \
    for (size_t at = blockIdx.x * size_t(blockDim.x) + threadIdx.x; at < (n); at += size_t(gridDim.x) * blockDim.x)
} // namespace

extern "C" __global__ void ucopy_f32(const size_t n, const size_t n_dims, const size_t *info, const float *in, float *out) {
    FOR_ALL(at, n) out[at] = in[place(at, n_dims, info)];
}
extern "C" __global__ void ucopy_u32(const size_t n, const size_t n_dims, const size_t *info, const unsigned *in,
                                     unsigned *out) {
    FOR_ALL(at, n) out[at] = in[place(at, n_dims, info)];
}
extern "C" __global__ void copy2d_f32(const float *from, float *to, unsigned rows, unsigned columns, unsigned from_stride,
                                      unsigned to_stride) {
    FOR_ALL(at, size_t(rows) * columns) to[at / columns * to_stride + at % columns] = from[at / columns * from_stride + at % columns];
}
extern "C" __global__ void const_set_f32(const size_t n, const size_t n_dims, const size_t *info, const float value,
                                         float *out) {
    FOR_ALL(at, n) out[place(at, n_dims, info)] = value;
}
