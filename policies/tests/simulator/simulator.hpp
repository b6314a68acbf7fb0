// CUDA's words for a C++ compiler, so that kernels run on a CPU, one block after another.
//
// A block's threads are fibers (fibers.cpp) that give way at barriers and whenever a warp exchanges numbers, which all of
// its threads must do together: a barrier that some threads skip is an error, and a missing one shows as a wrong number in
// one of the two orders in which threads are run (fibers.cpp). Vectors at addresses that are no multiples of their size end
// the process. What is not seen: races between blocks, which run in order, races that need two threads at one instant, the
// caches, the tensor cores' own instruction, registers and shared memory that a card has not, and speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef GRPO_KERNEL_NAMES
#define __global__
#endif
#define __device__
#define __host__
#define __forceinline__ inline
// Blocks run one after another, so one of each serves all.
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(n)

struct SimulatedIndex {
    unsigned x, y, z;
};
extern SimulatedIndex threadIdx, blockIdx, blockDim, gridDim;

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

using std::max;
using std::min;

inline float __uint_as_float(unsigned x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline unsigned __float_as_uint(float x) {
    unsigned y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }

// Barriers and exchanges, in fibers.cpp.
void __syncthreads();
void *simulated_dynamic_shared();
// Gives this lane's 8 bytes to the warp; the warp's bytes, lane after lane, until the exchange after the next.
const uint64_t *simulated_exchange(uint64_t mine);
// Whether products of this launch pass their numbers from lane to lane, as the card's own code for float does.
bool simulated_by_lanes();
// c += a · b, as mma.cuh lays them out.
void simulated_mma(float (&c)[4], const float (&a)[8], const float (&b)[4]);

template <typename T> T simulated_from_lane(T mine, int lane) {
    static_assert(sizeof(T) <= 8, "an exchange carries 8 bytes");
    uint64_t bytes = 0;
    std::memcpy(&bytes, &mine, sizeof(T));
    const uint64_t *all = simulated_exchange(bytes);
    T theirs;
    std::memcpy(&theirs, &all[lane & 31], sizeof(T));
    return theirs;
}
template <typename T> T __shfl_sync(unsigned, T mine, int lane) { return simulated_from_lane(mine, lane); }
template <typename T> T __shfl_xor_sync(unsigned, T mine, int mask) {
    return simulated_from_lane(mine, int(threadIdx.x % 32) ^ mask);
}
template <typename T> T __shfl_up_sync(unsigned, T mine, int offset) {
    const int lane = int(threadIdx.x % 32);
    return simulated_from_lane(mine, lane >= offset ? lane - offset : lane);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
    const uint64_t *all = simulated_exchange(mine);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= unsigned(all[lane] & 1) << lane;
    return bits;
}

// To the nearest, of two equally near ones the even.
inline unsigned simulated_to_bf16(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned simulated_pack_bf16(float low, float high) {
    return simulated_to_bf16(high) << 16 | simulated_to_bf16(low);
}
