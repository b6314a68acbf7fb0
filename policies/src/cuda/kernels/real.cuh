// Numbers, vectors of four, and sums over warps and blocks, shared by all kernels.
//
// `Real` is float or bf16: what activations are stored as. Sums, logarithms and exponentials are always taken in float.
// simulator.hpp stands in for the compiler's own words where kernels run on a CPU.
#pragma once

#ifdef GRPO_SIMULATED
#include "simulator.hpp"
#endif

struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

// Two numbers to bf16, to the nearest and of two equally near ones the even; the first lies lower.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#ifdef GRPO_SIMULATED
    return simulated_pack_bf16(low, high);
#else
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

template <typename Real> __device__ __forceinline__ Real narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) {
    bf16 result;
    result.bits = (unsigned short)(pack_bf16(x, 0.0f) & 0xffffu);
    return result;
}

// Four neighbours, at an address of their own size.
__device__ __forceinline__ void load4(const float *from, float (&to)[4]) {
    const float4 x = *reinterpret_cast<const float4 *>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ __forceinline__ void load4(const bf16 *from, float (&to)[4]) {
    const uint2 x = *reinterpret_cast<const uint2 *>(from);
    to[0] = __uint_as_float(x.x << 16), to[1] = __uint_as_float(x.x & 0xffff0000u);
    to[2] = __uint_as_float(x.y << 16), to[3] = __uint_as_float(x.y & 0xffff0000u);
}
__device__ __forceinline__ void store4(float *to, const float (&x)[4]) {
    *reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store4(bf16 *to, const float (&x)[4]) {
    *reinterpret_cast<uint2 *>(to) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

// A block's memory whose size is given at its launch.
#ifdef GRPO_SIMULATED
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(simulated_dynamic_shared())
#else
#define DYNAMIC_SHARED(type, name)                                                                                     \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];                                                    \
    type *name = reinterpret_cast<type *>(dynamic_shared)
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

template <typename Number> __device__ __forceinline__ Number warp_sum(Number x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// The sum over a block's threads, known to all of them; `scratch` has room for 32 numbers. The order is that of the
// threads, so equal inputs give equal bits.
template <typename Number> __device__ __forceinline__ Number block_sum(Number x, Number *scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    Number sum = 0;
    for (int warp = 0; warp < int(blockDim.x) / WARP; warp++) sum += scratch[warp];
    return sum;
}
__device__ __forceinline__ float block_max(float x, float *scratch) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float most = scratch[0];
    for (int warp = 1; warp < int(blockDim.x) / WARP; warp++) most = fmaxf(most, scratch[warp]);
    return most;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
