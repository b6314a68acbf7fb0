// Causal attention of whole rows, forward and back, without ever holding the scores (Dao, 2023, arXiv 2307.08691).
//
// Rows lie one behind another without padding. A token's queries, keys and values lie side by side, `[(h + 2 kv) · d]`,
// already turned. `tiles` names each block of QUERIES (or KEYS) tokens of each row: the row's first token, its length and
// the block's first place in it. Deviations from the paper:
// 1. Nothing is added by two blocks, so equal inputs give equal bits: gradients by keys and values are summed by the block
//    that owns the keys, over all heads that share them, and gradients by queries by another kernel, which makes the
//    scores a second time.
// 2. Log-sum-exps are natural logarithms, `[h, tokens]`.
#include "mma.cuh"

struct Tile {
    int first, length, start, unused;
};

struct Shape {
    int heads, kv_heads, tokens;
    float scale;
    __device__ size_t stride(int d) const { return size_t(heads + 2 * kv_heads) * d; }
};

constexpr int WARPS = 4;
constexpr int QUERIES = 16 * WARPS;
constexpr int KEYS = 16 * WARPS;

// Rows of a tile that is read through shared memory, forward and back: what fits the 48 KB that every card has.
template <typename Real, int D> struct Depth {
    static constexpr int value = sizeof(Real) == 2 && D <= 64 ? 64 : 32;
};
template <typename Real, int D> struct BackDepth {
    static constexpr int value = sizeof(Real) == 4 && D > 64 ? 16 : 32;
};
// A tile's rows lie this much further apart than they are long, so that a warp meets all banks.
constexpr int GAP = 8;

// Copies rows [start, start + N) of `from` into a tile, zeros from `length` on; where `turned` is given, also the tile's
// transpose.
template <typename Real, int N, int D>
__device__ void load_tile(Real *tile, Real *turned, const Real *from, size_t stride, int start, int length) {
    for (int at = threadIdx.x * 4; at < N * D; at += blockDim.x * 4) {
        const int row = at / D, column = at % D;
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (start + row < length) load4(from + size_t(start + row) * stride + column, x);
        if (tile) store4(tile + row * (D + GAP) + column, x);
        if (turned)
            for (int i = 0; i < 4; i++) turned[(column + i) * (N + GAP) + row] = narrow<Real>(x[i]);
    }
}

// c[j] = a · tileᵀ for tile rows 8 j .. 8 j + 8, both D wide.
template <typename Real, int N, int D>
__device__ __forceinline__ void scores(float (&c)[N / 8][4], const PairOf<Real> (&a)[D / 16][4], const Real *tile) {
    for (int j = 0; j < N / 8; j++) {
        for (int i = 0; i < 4; i++) c[j][i] = 0.0f;
        for (int k = 0; k < D / 16; k++) {
            PairOf<Real> b[2];
            load_b(b, tile + 8 * j * (D + GAP), D + GAP, 16 * k);
            mma(c[j], a[k], b);
        }
    }
}

// out += weights · tile, given the tile's transpose.
template <typename Real, int N, int D>
__device__ __forceinline__ void weigh(float (&out)[D / 8][4], const float (&weights)[N / 8][4], const Real *turned) {
    for (int k = 0; k < N / 16; k++) {
        PairOf<Real> a[4], b[2];
        a_of_c(a, weights[2 * k], weights[2 * k + 1]);
        for (int j = 0; j < D / 8; j++) {
            load_b(b, turned + 8 * j * (N + GAP), N + GAP, 16 * k);
            mma(out[j], a, b);
        }
    }
}

// Writes 16 rows of D numbers that lie as `c`, times a factor for each of a lane's two rows.
template <typename Real, int D>
__device__ __forceinline__ void store_rows(Real *to, size_t stride, const float (&c)[D / 8][4], float low, float high,
                                           int rows) {
    const int lane = threadIdx.x % WARP, row = lane / 4, column = 2 * (lane % 4);
    for (int j = 0; j < D / 8; j++) {
        if (row < rows) store_pair(to + row * stride + 8 * j + column, c[j][0] * low, c[j][1] * low);
        if (row + 8 < rows) store_pair(to + (row + 8) * stride + 8 * j + column, c[j][2] * high, c[j][3] * high);
    }
}

template <int N> __device__ __forceinline__ void clear(float (&c)[N][4]) {
    for (int j = 0; j < N; j++)
        for (int i = 0; i < 4; i++) c[j][i] = 0.0f;
}

// What each query attends to, `[tokens, h · d]`, and its log-sum-exp. Blocks: tiles of QUERIES by heads.
template <typename Real, int D>
__device__ void attend(Real *out, float *log_sums, const Real *qkv, const Tile *tiles, Shape shape) {
    constexpr int N = Depth<Real, D>::value;
    __shared__ __align__(16) Real keys[N * (D + GAP)];
    __shared__ __align__(16) Real values[D * (N + GAP)];
    const Tile tile = tiles[blockIdx.x];
    const int head = blockIdx.y, shared = head / (shape.heads / shape.kv_heads);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, mine = tile.start + 16 * warp;
    const size_t stride = shape.stride(D);
    const Real *row = qkv + tile.first * stride;
    const Real *key = row + (shape.heads + shared) * D, *value = key + shape.kv_heads * D;
    PairOf<Real> query[D / 16][4];
    for (int k = 0; k < D / 16; k++)
        load_a(query[k], row + mine * stride + head * D, stride, 16 * k, tile.length - mine);
    float sums[D / 8][4], most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    clear(sums);
    const int last = min(tile.length, tile.start + QUERIES);
    for (int start = 0; start < last; start += N) {
        __syncthreads();
        load_tile<Real, N, D>(keys, nullptr, key, stride, start, tile.length);
        load_tile<Real, N, D>(nullptr, values, value, stride, start, tile.length);
        __syncthreads();
        float score[N / 8][4];
        scores<Real, N, D>(score, query, keys);
        for (int j = 0; j < N / 8; j++)
            for (int i = 0; i < 4; i++) {
                const int place = mine + lane / 4 + 8 * (i / 2), seen = start + 8 * j + 2 * (lane % 4) + i % 2;
                score[j][i] = seen <= place ? score[j][i] * shape.scale : -INFINITY;
            }
        // The first tile holds place 0, which everyone sees: the greatest score is a number from then on.
        take_in(score, sums, most, total);
        weigh<Real, N, D>(sums, score, values);
    }
    store_rows<Real, D>(out + size_t(tile.first + mine) * shape.heads * D + head * D, size_t(shape.heads) * D, sums,
                        1.0f / total[0], 1.0f / total[1], tile.length - mine);
    for (int half = 0; half < 2; half++) {
        const int place = mine + lane / 4 + 8 * half;
        if (lane % 4 == 0 && place < tile.length)
            log_sums[size_t(head) * shape.tokens + tile.first + place] = most[half] + __logf(total[half]);
    }
}

// along[head, token] = the product of what a query attended to and the gradient by that; a warp each.
template <typename Real>
__device__ void attended_along(float *along, const Real *out, const Real *to_out, int heads, int tokens, int d) {
    const size_t at = size_t(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (at >= size_t(heads) * tokens) return;
    const size_t token = at / heads, head = at % heads, from = at * d;
    float sum = 0.0f;
    for (int i = threadIdx.x % WARP; i < d; i += WARP) sum += widen(out[from + i]) * widen(to_out[from + i]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) along[head * tokens + token] = sum;
}

// Gradients by queries, into their place in to_qkv. Blocks as in `attend`.
template <typename Real, int D>
__device__ void attend_back_queries(Real *to_qkv, const Real *to_out, const Real *qkv, const float *log_sums,
                                    const float *along, const Tile *tiles, Shape shape) {
    constexpr int N = BackDepth<Real, D>::value;
    __shared__ __align__(16) Real keys[N * (D + GAP)];
    __shared__ __align__(16) Real keys_turned[D * (N + GAP)];
    __shared__ __align__(16) Real values[N * (D + GAP)];
    const Tile tile = tiles[blockIdx.x];
    const int head = blockIdx.y, shared = head / (shape.heads / shape.kv_heads);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, mine = tile.start + 16 * warp;
    const size_t stride = shape.stride(D), out_stride = size_t(shape.heads) * D;
    const Real *row = qkv + tile.first * stride;
    const Real *key = row + (shape.heads + shared) * D, *value = key + shape.kv_heads * D;
    PairOf<Real> query[D / 16][4], to[D / 16][4];
    for (int k = 0; k < D / 16; k++) {
        load_a(query[k], row + mine * stride + head * D, stride, 16 * k, tile.length - mine);
        load_a(to[k], to_out + size_t(tile.first + mine) * out_stride + head * D, out_stride, 16 * k,
               tile.length - mine);
    }
    float log_sum[2], dot[2];
    for (int half = 0; half < 2; half++) {
        const int place = min(mine + lane / 4 + 8 * half, tile.length - 1);
        log_sum[half] = log_sums[size_t(head) * shape.tokens + tile.first + place];
        dot[half] = along[size_t(head) * shape.tokens + tile.first + place];
    }
    float sums[D / 8][4];
    clear(sums);
    const int last = min(tile.length, tile.start + QUERIES);
    for (int start = 0; start < last; start += N) {
        __syncthreads();
        load_tile<Real, N, D>(keys, keys_turned, key, stride, start, tile.length);
        load_tile<Real, N, D>(values, nullptr, value, stride, start, tile.length);
        __syncthreads();
        float score[N / 8][4], by_weight[N / 8][4];
        scores<Real, N, D>(score, query, keys);
        scores<Real, N, D>(by_weight, to, values);
        for (int j = 0; j < N / 8; j++)
            for (int i = 0; i < 4; i++) {
                const int half = i / 2, seen = start + 8 * j + 2 * (lane % 4) + i % 2;
                const bool counts = seen <= mine + lane / 4 + 8 * half && seen < tile.length;
                const float weight = counts ? __expf(score[j][i] * shape.scale - log_sum[half]) : 0.0f;
                score[j][i] = weight * (by_weight[j][i] - dot[half]);
            }
        weigh<Real, N, D>(sums, score, keys_turned);
    }
    store_rows<Real, D>(to_qkv + size_t(tile.first + mine) * stride + head * D, stride, sums, shape.scale, shape.scale,
                        tile.length - mine);
}

// Gradients by keys and values, into their places in to_qkv. Blocks: tiles of KEYS by heads of keys.
template <typename Real, int D>
__device__ void attend_back_keys(Real *to_qkv, const Real *to_out, const Real *qkv, const float *log_sums,
                                 const float *along, const Tile *tiles, Shape shape) {
    constexpr int N = BackDepth<Real, D>::value;
    __shared__ __align__(16) Real queries[N * (D + GAP)];
    __shared__ __align__(16) Real queries_turned[D * (N + GAP)];
    __shared__ __align__(16) Real to[N * (D + GAP)];
    __shared__ __align__(16) Real to_turned[D * (N + GAP)];
    __shared__ float sums_of[N], dots_of[N];
    const Tile tile = tiles[blockIdx.x];
    const int shared = blockIdx.y, group = shape.heads / shape.kv_heads;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, mine = tile.start + 16 * warp;
    const size_t stride = shape.stride(D), out_stride = size_t(shape.heads) * D;
    const Real *row = qkv + tile.first * stride;
    const Real *key = row + mine * stride + (shape.heads + shared) * D, *value = key + shape.kv_heads * D;
    PairOf<Real> of_key[D / 16][4], of_value[D / 16][4];
    for (int k = 0; k < D / 16; k++) {
        load_a(of_key[k], key, stride, 16 * k, tile.length - mine);
        load_a(of_value[k], value, stride, 16 * k, tile.length - mine);
    }
    float to_key[D / 8][4], to_value[D / 8][4];
    clear(to_key), clear(to_value);
    for (int head = shared * group; head < (shared + 1) * group; head++) {
        for (int start = tile.start / N * N; start < tile.length; start += N) {
            __syncthreads();
            load_tile<Real, N, D>(queries, queries_turned, row + head * D, stride, start, tile.length);
            load_tile<Real, N, D>(to, to_turned, to_out + size_t(tile.first) * out_stride + head * D, out_stride, start,
                                  tile.length);
            for (int at = threadIdx.x; at < N; at += blockDim.x) {
                const size_t from = size_t(head) * shape.tokens + tile.first + min(start + at, tile.length - 1);
                sums_of[at] = log_sums[from], dots_of[at] = along[from];
            }
            __syncthreads();
            float weight[N / 8][4], by_score[N / 8][4];
            scores<Real, N, D>(weight, of_key, queries);
            scores<Real, N, D>(by_score, of_value, to);
            for (int j = 0; j < N / 8; j++)
                for (int i = 0; i < 4; i++) {
                    const int at = 8 * j + 2 * (lane % 4) + i % 2, seen = mine + lane / 4 + 8 * (i / 2);
                    const bool counts = seen <= start + at && start + at < tile.length;
                    weight[j][i] = counts ? __expf(weight[j][i] * shape.scale - sums_of[at]) : 0.0f;
                    by_score[j][i] = weight[j][i] * (by_score[j][i] - dots_of[at]);
                }
            weigh<Real, N, D>(to_value, weight, to_turned);
            weigh<Real, N, D>(to_key, by_score, queries_turned);
        }
    }
    Real *out = to_qkv + size_t(tile.first + mine) * stride + (shape.heads + shared) * D;
    store_rows<Real, D>(out, stride, to_key, shape.scale, shape.scale, tile.length - mine);
    store_rows<Real, D>(out + shape.kv_heads * D, stride, to_value, 1.0f, 1.0f, tile.length - mine);
}

#define ATTENTION_KERNELS(Real, name, D)                                                                               \
    extern "C" __global__ void __launch_bounds__(128) attend_##D##_##name(                                             \
        Real *out, float *log_sums, const Real *qkv, const Tile *tiles, Shape shape) {                                 \
        attend<Real, D>(out, log_sums, qkv, tiles, shape);                                                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) attend_back_queries_##D##_##name(                                \
        Real *to_qkv, const Real *to_out, const Real *qkv, const float *log_sums, const float *along,                  \
        const Tile *tiles, Shape shape) {                                                                              \
        attend_back_queries<Real, D>(to_qkv, to_out, qkv, log_sums, along, tiles, shape);                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) attend_back_keys_##D##_##name(                                   \
        Real *to_qkv, const Real *to_out, const Real *qkv, const float *log_sums, const float *along,                  \
        const Tile *tiles, Shape shape) {                                                                              \
        attend_back_keys<Real, D>(to_qkv, to_out, qkv, log_sums, along, tiles, shape);                                 \
    }
#define ATTENTION_OF(Real, name)                                                                                       \
    ATTENTION_KERNELS(Real, name, 32)                                                                                  \
    ATTENTION_KERNELS(Real, name, 64)                                                                                  \
    ATTENTION_KERNELS(Real, name, 128)                                                                                 \
    extern "C" __global__ void attended_along_##name(float *along, const Real *out, const Real *to_out, int heads,     \
                                                     int tokens, int d) {                                              \
        attended_along(along, out, to_out, heads, tokens, d);                                                          \
    }

ATTENTION_OF(float, f32)
ATTENTION_OF(bf16, bf16)
