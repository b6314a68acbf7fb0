// AdamW in one pass over parameter, gradient and moments, 28 bytes a parameter, and the sum of a gradient's squares.
#include "real.cuh"

// The numbers of grpo's optimiser for one update: see its `Step`.
struct Step {
    float shrink, beta1, beta2, keep, scale, root_correction, eps;
};

extern "C" __global__ void adamw(float *param, float *first, float *second, const float *gradient, Step step, size_t n) {
    const size_t begin = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (begin >= n) return;
    const int count = int(n - begin < 4 ? n - begin : 4);
    float p[4], m[4], v[4], g[4];
    if (count == 4) {
        load4(param + begin, p), load4(first + begin, m), load4(second + begin, v), load4(gradient + begin, g);
    } else {
        for (int i = 0; i < count; i++)
            p[i] = param[begin + i], m[i] = first[begin + i], v[i] = second[begin + i], g[i] = gradient[begin + i];
    }
    for (int i = 0; i < count; i++) {
        const float x = g[i] * step.shrink;
        m[i] = step.beta1 * m[i] + (1.0f - step.beta1) * x;
        v[i] = step.beta2 * v[i] + (1.0f - step.beta2) * (x * x);
        p[i] = step.keep * p[i] - step.scale * m[i] / (sqrtf(v[i]) / step.root_correction + step.eps);
    }
    if (count == 4) {
        store4(param + begin, p), store4(first + begin, m), store4(second + begin, v);
    } else {
        for (int i = 0; i < count; i++) param[begin + i] = p[i], first[begin + i] = m[i], second[begin + i] = v[i];
    }
}

constexpr int SQUARED = 1 << 14;

// parts[block] = the sum of squares of a block of SQUARED numbers.
extern "C" __global__ void sum_squares(double *parts, const float *x, size_t n) {
    __shared__ double scratch[32];
    const size_t begin = size_t(blockIdx.x) * SQUARED, end = n - begin < SQUARED ? n : begin + SQUARED;
    double sum = 0.0;
    for (size_t at = begin + threadIdx.x; at < end; at += blockDim.x) sum += double(x[at]) * double(x[at]);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
