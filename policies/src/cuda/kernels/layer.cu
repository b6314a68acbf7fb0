// What a layer does beside its products and its attention: embedding, RMSNorm, bias and rotation, SwiGLU, each with its
// way back. The residual stream is float; what goes into products is `Real`.
#include "real.cuh"

// out[token] = table[ids[token]]; a block a token.
extern "C" __global__ void embed(float *out, const float *table, const unsigned *ids, int width) {
    const size_t to = size_t(blockIdx.x) * width, from = size_t(ids[blockIdx.x]) * width;
    for (int at = threadIdx.x * 4; at < width; at += blockDim.x * 4) {
        float x[4];
        load4(table + from + at, x);
        store4(out + to + at, x);
    }
}

// Adds to sum[id] the gradients of the tokens that read it, in the order of the tokens: a block an id that occurs, its
// tokens being order[first[block] .. first[block + 1]].
extern "C" __global__ void embed_back(float *sum, const float *gradient, const unsigned *ids, const unsigned *first,
                                      const unsigned *order, int width) {
    const size_t to = size_t(ids[blockIdx.x]) * width;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        float x = sum[to + at];
        for (unsigned place = first[blockIdx.x]; place < first[blockIdx.x + 1]; place++)
            x += gradient[size_t(order[place]) * width + at];
        sum[to + at] = x;
    }
}

// RMSNorm of the tokens places[block], or of token `block` where there are no places.
template <typename Real>
__device__ void rms_norm(Real *out, const float *x, const float *weight, const unsigned *places, int width, float eps) {
    __shared__ float scratch[32];
    const size_t token = places ? places[blockIdx.x] : blockIdx.x;
    x += token * width, out += size_t(blockIdx.x) * width;
    float squares = 0.0f;
    for (int at = threadIdx.x * 4; at < width; at += blockDim.x * 4) {
        float v[4];
        load4(x + at, v);
        squares += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
    for (int at = threadIdx.x * 4; at < width; at += blockDim.x * 4) {
        float v[4], w[4];
        load4(x + at, v), load4(weight + at, w);
        for (int i = 0; i < 4; i++) v[i] *= scale * w[i];
        store4(out + at, v);
    }
}

// Adds to to_x the gradient that comes through the norm, and gives each block's part of the weight's, `[blocks, width]`.
// A block takes `per_block` tokens; `to` is the gradient by what the norm gave. As in rms_norm, `places` may choose tokens;
// none of them twice. Dynamic memory: `width` floats.
template <typename Real>
__device__ void rms_norm_back(float *to_x, float *to_weight, const Real *to, const float *x, const float *weight,
                              const unsigned *places, int rows, int per_block, int width, float eps) {
    __shared__ float scratch[32];
    DYNAMIC_SHARED(float, part);
    for (int at = threadIdx.x; at < width; at += blockDim.x) part[at] = 0.0f;
    for (int row = blockIdx.x * per_block; row < min(rows, int(blockIdx.x + 1) * per_block); row++) {
        const size_t token = places ? places[row] : row;
        const float *of_x = x + token * width;
        const Real *of_to = to + size_t(row) * width;
        float squares = 0.0f, product = 0.0f;
        for (int at = threadIdx.x; at < width; at += blockDim.x) {
            const float v = of_x[at];
            squares += v * v, product += v * widen(of_to[at]) * weight[at];
        }
        const float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
        const float along = block_sum(product, scratch) * scale * scale * scale / width;
        for (int at = threadIdx.x; at < width; at += blockDim.x) {
            const float v = of_x[at], g = widen(of_to[at]);
            to_x[token * width + at] += g * weight[at] * scale - v * along;
            part[at] += g * v * scale;
        }
    }
    for (int at = threadIdx.x; at < width; at += blockDim.x) to_weight[size_t(blockIdx.x) * width + at] = part[at];
}

// sum[column] += the sum over rows, which lie `stride` apart, in their order.
extern "C" __global__ void add_rows(float *sum, const float *parts, int rows, int width, int stride) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    float x = 0.0f;
    for (int row = 0; row < rows; row++) x += parts[size_t(row) * stride + column];
    sum[column] += x;
}

// parts[block, column] = the sum of a block of `per_block` rows.
template <typename Real> __device__ void sum_blocks(float *parts, const Real *x, int rows, int per_block, int width) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    float sum = 0.0f;
    for (int row = blockIdx.y * per_block; row < min(rows, int(blockIdx.y + 1) * per_block); row++)
        sum += widen(x[size_t(row) * width + column]);
    parts[size_t(blockIdx.y) * width + column] = sum;
}

// Where a token stands and how it turns. Text stands on a line. Where `columns` is not 0, what stands from `image` on is a
// picture of so many columns: even frequencies turn by its lines and odd ones by its columns.
struct Turn {
    const float *cos, *sin;
    int half, columns;
    __device__ size_t at(int index, int image, int frequency) const {
        int position = index;
        if (columns > 0 && index >= image) {
            const int token = index - image;
            position = image + (frequency % 2 == 0 ? token / columns : token % columns);
        }
        return size_t(position) * half + frequency;
    }
};

// Adds the bias to queries, keys and values and turns queries and keys, in place; `sign` -1 turns them back, without
// bias. A block a token; `index` is its place in its row and `image` where its row's picture begins.
template <typename Real>
__device__ void rotate(Real *qkv, const float *bias, const int *index, const int *image, const float *cos,
                       const float *sin, int columns, int turned, int heads, int half, float sign) {
    const Turn turn = {cos, sin, half, columns};
    const int place = index[blockIdx.x], start = image[blockIdx.x];
    qkv += size_t(blockIdx.x) * heads * 2 * half;
    for (int at = threadIdx.x; at < heads * half; at += blockDim.x) {
        const int head = at / half, frequency = at % half;
        const int low = head * 2 * half + frequency, high = low + half;
        float x = widen(qkv[low]), y = widen(qkv[high]);
        if (bias) x += bias[low], y += bias[high];
        if (head < turned) {
            const size_t angle = turn.at(place, start, frequency);
            const float c = cos[angle], s = sign * sin[angle], old = x;
            x = x * c - y * s, y = y * c + old * s;
        }
        qkv[low] = narrow<Real>(x), qkv[high] = narrow<Real>(y);
    }
}

// active = silu(gate) · up, for rows of gate and up side by side; four numbers a thread.
template <typename Real> __device__ void swiglu(Real *active, const Real *gate_up, int rows, int width) {
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (at >= size_t(rows) * width) return;
    const size_t row = at / width, column = at % width;
    float gate[4], up[4];
    load4(gate_up + row * 2 * width + column, gate);
    load4(gate_up + row * 2 * width + width + column, up);
    for (int i = 0; i < 4; i++) gate[i] *= sigmoid(gate[i]) * up[i];
    store4(active + at, gate);
}

// In place: gate_up becomes the gradient by it, and active, which holds the gradient by the activation, becomes the
// activation.
template <typename Real> __device__ void swiglu_back(Real *active, Real *gate_up, int rows, int width) {
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (at >= size_t(rows) * width) return;
    const size_t row = at / width, column = at % width;
    Real *gates = gate_up + row * 2 * width + column, *ups = gates + width;
    float gate[4], up[4], to[4];
    load4(gates, gate), load4(ups, up), load4(active + at, to);
    for (int i = 0; i < 4; i++) {
        const float s = sigmoid(gate[i]), silu = gate[i] * s, g = to[i];
        to[i] = silu * up[i];
        gate[i] = g * up[i] * (s + silu * (1.0f - s));
        up[i] = g * silu;
    }
    store4(active + at, to), store4(gates, gate), store4(ups, up);
}

// Another type of number; four a thread.
template <typename Real> __device__ void cast(Real *out, const float *x, size_t n) {
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (at + 4 <= n) {
        float v[4];
        load4(x + at, v);
        store4(out + at, v);
    } else {
        for (size_t i = at; i < n; i++) out[i] = narrow<Real>(x[i]);
    }
}

#define LAYER_KERNELS(Real, name)                                                                                      \
    extern "C" __global__ void rms_norm_##name(Real *out, const float *x, const float *weight,                         \
                                               const unsigned *places, int width, float eps) {                         \
        rms_norm(out, x, weight, places, width, eps);                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void rms_norm_back_##name(float *to_x, float *to_weight, const Real *to, const float *x,     \
                                                    const float *weight, const unsigned *places, int rows,             \
                                                    int per_block, int width, float eps) {                             \
        rms_norm_back(to_x, to_weight, to, x, weight, places, rows, per_block, width, eps);                            \
    }                                                                                                                  \
    extern "C" __global__ void sum_blocks_##name(float *parts, const Real *x, int rows, int per_block, int width) {    \
        sum_blocks(parts, x, rows, per_block, width);                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void rotate_##name(Real *qkv, const float *bias, const int *index, const int *image,         \
                                             const float *cos, const float *sin, int columns, int turned, int heads,   \
                                             int half, float sign) {                                                   \
        rotate(qkv, bias, index, image, cos, sin, columns, turned, heads, half, sign);                                 \
    }                                                                                                                  \
    extern "C" __global__ void swiglu_##name(Real *active, const Real *gate_up, int rows, int width) {                 \
        swiglu(active, gate_up, rows, width);                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void swiglu_back_##name(Real *active, Real *gate_up, int rows, int width) {                  \
        swiglu_back(active, gate_up, rows, width);                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void cast_##name(Real *out, const float *x, size_t n) { cast(out, x, n); }

LAYER_KERNELS(float, f32)
LAYER_KERNELS(bf16, bf16)
