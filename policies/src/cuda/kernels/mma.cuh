// A warp's product of tiles, c += a · b: a is 16 x 16, b is 16 x 8, c is 16 x 8.
//
// Each lane holds what PTX's mma.m16n8k16 gives it (PTX ISA, "Matrix fragments for mma.m16n8k16"). With g = lane / 4 and
// p = 2 (lane % 4):
//     a: (g, p..), (g + 8, p..), (g, p + 8..), (g + 8, p + 8..)    four pairs of neighbours in a row
//     b: (p.., g), (p + 8.., g)                                    two pairs of neighbours in a column
//     c: (g, p..), (g + 8, p..)                                    two pairs of neighbours in a row
// bf16 goes to the tensor cores. float has none that keeps its bits, so there the lanes pass their numbers around: many
// times slower, for checking and not for speed.
#pragma once
#include "real.cuh"

template <typename Real> struct PairOf;
template <> struct PairOf<float> {
    float low, high;
};
template <> struct PairOf<bf16> {
    unsigned both;
};

__device__ __forceinline__ void make_pair(PairOf<float> &pair, float low, float high) { pair.low = low, pair.high = high; }
__device__ __forceinline__ void make_pair(PairOf<bf16> &pair, float low, float high) { pair.both = pack_bf16(low, high); }

// Two neighbours in memory, at an address of their own size.
__device__ __forceinline__ void load_pair(PairOf<float> &pair, const float *from) {
    const float2 x = *reinterpret_cast<const float2 *>(from);
    pair.low = x.x, pair.high = x.y;
}
__device__ __forceinline__ void load_pair(PairOf<bf16> &pair, const bf16 *from) {
    pair.both = *reinterpret_cast<const unsigned *>(from);
}
// Writes c's pairs.
__device__ __forceinline__ void store_pair(float *to, float low, float high) {
    *reinterpret_cast<float2 *>(to) = make_float2(low, high);
}
__device__ __forceinline__ void store_pair(bf16 *to, float low, float high) {
    *reinterpret_cast<unsigned *>(to) = pack_bf16(low, high);
}

__device__ __forceinline__ float half_of(const PairOf<float> &pair, int which) { return which ? pair.high : pair.low; }
__device__ __forceinline__ float half_of(const PairOf<bf16> &pair, int which) {
    return __uint_as_float(which ? pair.both & 0xffff0000u : pair.both << 16);
}

// By passing numbers from lane to lane.
template <typename Real>
__device__ void mma_by_lanes(float (&c)[4], const PairOf<Real> (&a)[4], const PairOf<Real> (&b)[2]) {
    const int lane = threadIdx.x % WARP, row = lane / 4, column = 2 * (lane % 4);
    for (int k = 0; k < 16; k++) {
        const int pair = k % 8 / 2, upper = k / 8, which = k % 2;
        const float low_row = __shfl_sync(ALL_LANES, half_of(a[2 * upper], which), row * 4 + pair);
        const float high_row = __shfl_sync(ALL_LANES, half_of(a[2 * upper + 1], which), row * 4 + pair);
        const float left = __shfl_sync(ALL_LANES, half_of(b[upper], which), column * 4 + pair);
        const float right = __shfl_sync(ALL_LANES, half_of(b[upper], which), (column + 1) * 4 + pair);
        c[0] += low_row * left, c[1] += low_row * right;
        c[2] += high_row * left, c[3] += high_row * right;
    }
}

#ifdef GRPO_SIMULATED
template <typename Real>
__device__ void mma(float (&c)[4], const PairOf<Real> (&a)[4], const PairOf<Real> (&b)[2]) {
    if (simulated_by_lanes()) return mma_by_lanes(c, a, b);
    float of_a[8], of_b[4];
    for (int i = 0; i < 8; i++) of_a[i] = half_of(a[i / 2], i % 2);
    for (int i = 0; i < 4; i++) of_b[i] = half_of(b[i / 2], i % 2);
    simulated_mma(c, of_a, of_b);
}
#else
__device__ __forceinline__ void mma(float (&c)[4], const PairOf<float> (&a)[4], const PairOf<float> (&b)[2]) {
    mma_by_lanes(c, a, b);
}
__device__ __forceinline__ void mma(float (&c)[4], const PairOf<bf16> (&a)[4], const PairOf<bf16> (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0].both), "r"(a[1].both), "r"(a[2].both), "r"(a[3].both), "r"(b[0].both), "r"(b[1].both));
}
#endif

// Fragment `a` of 16 rows of memory, `stride` apart, from column `at` on; rows from `rows` on are taken as zeros.
template <typename Real>
__device__ __forceinline__ void load_a(PairOf<Real> (&a)[4], const Real *from, size_t stride, int at, int rows) {
    const int lane = threadIdx.x % WARP, row = lane / 4, column = at + 2 * (lane % 4);
    for (int i = 0; i < 4; i++) {
        const int of_row = row + 8 * (i % 2);
        make_pair(a[i], 0.0f, 0.0f);
        if (of_row < rows) load_pair(a[i], from + of_row * stride + column + 8 * (i / 2));
    }
}

// Fragment `b` whose column n is row n of a tile in memory, `stride` apart, from `at` on.
template <typename Real>
__device__ __forceinline__ void load_b(PairOf<Real> (&b)[2], const Real *tile, int stride, int at) {
    const int lane = threadIdx.x % WARP;
    const Real *from = tile + (lane / 4) * stride + at + 2 * (lane % 4);
    load_pair(b[0], from);
    load_pair(b[1], from + 8);
}

// Two fragments `c`, side by side, as fragment `a` of the next product.
template <typename Real>
__device__ __forceinline__ void a_of_c(PairOf<Real> (&a)[4], const float (&left)[4], const float (&right)[4]) {
    make_pair(a[0], left[0], left[1]);
    make_pair(a[1], left[2], left[3]);
    make_pair(a[2], right[0], right[1]);
    make_pair(a[3], right[2], right[3]);
}

// The greatest and the sum over a row of c, whose numbers lie in four neighbouring lanes.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Takes in a tile of scores, of which those that are not seen are minus infinity: they become weights relative to the
// greatest score so far, and what was summed before them shrinks to it. A lane has two rows of each.
template <int N, int W>
__device__ __forceinline__ void take_in(float (&score)[N][4], float (&sums)[W][4], float (&most)[2], float (&total)[2]) {
    for (int half = 0; half < 2; half++) {
        float top = -INFINITY;
        for (int j = 0; j < N; j++) top = fmaxf(top, fmaxf(score[j][2 * half], score[j][2 * half + 1]));
        top = fmaxf(most[half], row_max(top));
        const float shrink = __expf(most[half] - top);
        float sum = 0.0f;
        for (int j = 0; j < N; j++)
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                score[j][i] = __expf(score[j][i] - top);
                sum += score[j][i];
            }
        total[half] = total[half] * shrink + row_sum(sum), most[half] = top;
        for (int j = 0; j < W; j++) sums[j][2 * half] *= shrink, sums[j][2 * half + 1] *= shrink;
    }
}
