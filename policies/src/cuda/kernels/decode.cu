// Cached decoding: one more token in each row.
//
// The cache of a layer is `[rows, kv, capacity, d]`, keys and values apart. Where a row stands, `lengths[row]`, is read
// from the device, so that one captured graph serves every step. Keys are split into parts of SPLIT, whatever the batch,
// so that the sums of a row are made in one order.
#include "mma.cuh"

constexpr int SPLIT = 256;
constexpr int GAP_OF_CACHE = 8;

// Copies the keys and values of prompts, `[tokens, (h + 2 kv) · d]`, into the cache: row r of it gets those of the prompt
// that begins at token first[r] and has lengths[r] tokens. Blocks: tokens of the longest prompt by rows.
template <typename Real>
__device__ void fill_cache(Real *keys, Real *values, const Real *qkv, const int *first, const int *lengths, int heads,
                           int kv_heads, int d, int capacity) {
    const int row = blockIdx.y, place = blockIdx.x, width = kv_heads * d;
    if (place >= lengths[row]) return;
    const Real *from = qkv + size_t(first[row] + place) * (heads * d + 2 * width) + heads * d;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        const size_t to = (size_t(row * kv_heads + at / d) * capacity + place) * d + at % d;
        keys[to] = from[at], values[to] = from[width + at];
    }
}

// Copies the new token's key and value of each row into the cache. Blocks: rows.
template <typename Real>
__device__ void extend_cache(Real *keys, Real *values, const Real *qkv, const int *lengths, int heads, int kv_heads,
                             int d, int capacity) {
    const int row = blockIdx.x, width = kv_heads * d;
    const Real *from = qkv + size_t(row) * (heads * d + 2 * width) + heads * d;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        const size_t to = (size_t(row * kv_heads + at / d) * capacity + lengths[row]) * d + at % d;
        keys[to] = from[at], values[to] = from[width + at];
    }
}

// Warps of a block, each of which takes 16 keys of a tile.
template <typename Real, int D> struct Team {
    static constexpr int value = sizeof(Real) == 4 && D > 64 ? 2 : 4;
};

// What the queries that share a head of keys attend to among one part of a row's keys: sums that are not yet divided,
// `[rows, h, parts, d]`, with the greatest score and the sum of exponentials, `[rows, h, parts, 2]`. The queries are the
// 16 rows of a product, of which h / kv are real. Blocks: parts by kv by rows.
template <typename Real, int D>
__device__ void attend_part(float *sums, float *scales, const Real *qkv, const Real *keys, const Real *values,
                            const int *lengths, int heads, int kv_heads, int capacity, float scale) {
    constexpr int TEAM = Team<Real, D>::value, N = 16 * TEAM;
    __shared__ __align__(16) Real key_tile[N * (D + GAP_OF_CACHE)];
    __shared__ __align__(16) Real value_tile[D * (N + GAP_OF_CACHE)];
    __shared__ float tops[TEAM][16], totals[TEAM][16];
    const int part = blockIdx.x, shared = blockIdx.y, row = blockIdx.z, group = heads / kv_heads;
    const int seen = lengths[row] + 1, first = part * SPLIT, last = min(seen, first + SPLIT);
    if (first >= seen) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const size_t cache = size_t(row * kv_heads + shared) * capacity * D;
    const Real *query = qkv + (size_t(row) * (heads + 2 * kv_heads) + shared * group) * D;
    PairOf<Real> of_query[D / 16][4];
    for (int k = 0; k < D / 16; k++) load_a(of_query[k], query, D, 16 * k, group);
    float out[D / 8][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    for (int j = 0; j < D / 8; j++)
        for (int i = 0; i < 4; i++) out[j][i] = 0.0f;
    for (int start = first; start < last; start += N) {
        __syncthreads();
        for (int at = threadIdx.x * 4; at < N * D; at += blockDim.x * 4) {
            const int place = at / D, column = at % D;
            float k[4] = {0.0f, 0.0f, 0.0f, 0.0f}, v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (start + place < last) {
                load4(keys + cache + size_t(start + place) * D + column, k);
                load4(values + cache + size_t(start + place) * D + column, v);
            }
            store4(key_tile + place * (D + GAP_OF_CACHE) + column, k);
            for (int i = 0; i < 4; i++) value_tile[(column + i) * (N + GAP_OF_CACHE) + place] = narrow<Real>(v[i]);
        }
        __syncthreads();
        if (start + 16 * warp >= last) continue;
        float score[2][4];
        for (int j = 0; j < 2; j++) {
            for (int i = 0; i < 4; i++) score[j][i] = 0.0f;
            for (int k = 0; k < D / 16; k++) {
                PairOf<Real> b[2];
                load_b(b, key_tile + (16 * warp + 8 * j) * (D + GAP_OF_CACHE), D + GAP_OF_CACHE, 16 * k);
                mma(score[j], of_query[k], b);
            }
        }
        for (int j = 0; j < 2; j++)
            for (int i = 0; i < 4; i++) {
                const int place = start + 16 * warp + 8 * j + 2 * (lane % 4) + i % 2;
                score[j][i] = place < last ? score[j][i] * scale : -INFINITY;
            }
        take_in(score, out, top, total);
        PairOf<Real> a[4], b[2];
        a_of_c(a, score[0], score[1]);
        for (int j = 0; j < D / 8; j++) {
            load_b(b, value_tile + 8 * j * (N + GAP_OF_CACHE), N + GAP_OF_CACHE, 16 * warp);
            mma(out[j], a, b);
        }
    }
    if (lane % 4 == 0)
        for (int half = 0; half < 2; half++) {
            tops[warp][lane / 4 + 8 * half] = top[half];
            totals[warp][lane / 4 + 8 * half] = total[half];
        }
    __syncthreads();
    // The warps add in their order, into the memory of the keys.
    float *both = reinterpret_cast<float *>(key_tile);
    float most[2], factor[2];
    for (int half = 0; half < 2; half++) {
        most[half] = -INFINITY;
        for (int other = 0; other < TEAM; other++) most[half] = fmaxf(most[half], tops[other][lane / 4 + 8 * half]);
        factor[half] = __expf(top[half] - most[half]);
    }
    for (int turn = 0; turn < TEAM; turn++) {
        if (turn == warp)
            for (int j = 0; j < D / 8; j++)
                for (int i = 0; i < 4; i++) {
                    float &sum = both[(lane / 4 + 8 * (i / 2)) * D + 8 * j + 2 * (lane % 4) + i % 2];
                    sum = (turn == 0 ? 0.0f : sum) + out[j][i] * factor[i / 2];
                }
        __syncthreads();
    }
    const int parts = gridDim.x;
    for (int at = threadIdx.x; at < group * D; at += blockDim.x) {
        const int head = shared * group + at / D;
        sums[((size_t(row) * heads + head) * parts + part) * D + at % D] = both[at];
    }
    for (int member = threadIdx.x; member < group; member += blockDim.x) {
        float greatest = -INFINITY, sum = 0.0f;
        for (int other = 0; other < TEAM; other++) greatest = fmaxf(greatest, tops[other][member]);
        for (int other = 0; other < TEAM; other++) sum += totals[other][member] * __expf(tops[other][member] - greatest);
        float *to = scales + ((size_t(row) * heads + shared * group + member) * parts + part) * 2;
        to[0] = greatest, to[1] = sum;
    }
}

// What each query attends to over all parts, `[rows, h · d]`. Blocks: heads by rows; threads: d.
template <typename Real>
__device__ void attend_whole(Real *out, const float *sums, const float *scales, const int *lengths, int heads, int d,
                             int parts) {
    const int head = blockIdx.x, row = blockIdx.y, used = min(parts, lengths[row] / SPLIT + 1);
    const size_t at = (size_t(row) * heads + head) * parts;
    float most = -INFINITY, total = 0.0f, sum = 0.0f;
    for (int part = 0; part < used; part++) most = fmaxf(most, scales[(at + part) * 2]);
    for (int part = 0; part < used; part++) {
        const float factor = __expf(scales[(at + part) * 2] - most);
        total += scales[(at + part) * 2 + 1] * factor;
        sum += sums[(at + part) * d + threadIdx.x] * factor;
    }
    out[(size_t(row) * heads + head) * d + threadIdx.x] = narrow<Real>(sum / total);
}

// Every row has one token more, and so has the image.
extern "C" __global__ void advance(int *lengths, int *step, int rows) {
    for (int row = threadIdx.x; row < rows; row += blockDim.x) lengths[row]++;
    if (threadIdx.x == 0) step[0]++;
}

#define PART_KERNEL(Real, name, D)                                                                                     \
    extern "C" __global__ void __launch_bounds__(128) attend_part_##D##_##name(                                        \
        float *sums, float *scales, const Real *qkv, const Real *keys, const Real *values, const int *lengths,         \
        int heads, int kv_heads, int capacity, float scale) {                                                          \
        attend_part<Real, D>(sums, scales, qkv, keys, values, lengths, heads, kv_heads, capacity, scale);              \
    }
#define DECODE_KERNELS(Real, name)                                                                                     \
    PART_KERNEL(Real, name, 32)                                                                                        \
    PART_KERNEL(Real, name, 64)                                                                                        \
    PART_KERNEL(Real, name, 128)                                                                                       \
    extern "C" __global__ void fill_cache_##name(Real *keys, Real *values, const Real *qkv, const int *first,          \
                                                 const int *lengths, int heads, int kv_heads, int d, int capacity) {   \
        fill_cache(keys, values, qkv, first, lengths, heads, kv_heads, d, capacity);                                   \
    }                                                                                                                  \
    extern "C" __global__ void extend_cache_##name(Real *keys, Real *values, const Real *qkv, const int *lengths,      \
                                                   int heads, int kv_heads, int d, int capacity) {                     \
        extend_cache(keys, values, qkv, lengths, heads, kv_heads, d, capacity);                                        \
    }                                                                                                                  \
    extern "C" __global__ void attend_whole_##name(Real *out, const float *sums, const float *scales,                  \
                                                   const int *lengths, int heads, int d, int parts) {                  \
        attend_whole(out, sums, scales, lengths, heads, d, parts);                                                     \
    }

DECODE_KERNELS(float, f32)
DECODE_KERNELS(bf16, bf16)
