// Log-probabilities and entropies of chosen ids, from logits of a chunk of tokens, and the gradient by the logits.
#include "real.cuh"

// Sums over exponentials that grow with the greatest number seen.
struct Sums {
    float most, total, weighted;
    __device__ void add(float x) {
        if (x > most) {
            const float shrink = __expf(most - x);
            total = total * shrink + 1.0f, weighted = weighted * shrink + x, most = x;
        } else {
            const float weight = __expf(x - most);
            total += weight, weighted += weight * x;
        }
    }
};

// result is `[3, n]`: log-probability, entropy and log-sum-exp of each row of logits, `[rows, width]`, times `sharpness`.
// A block a row, from row `first` of the result on.
extern "C" __global__ void score_rows(float *result, const float *logits, const unsigned *targets, float sharpness,
                                      int width, int first, int n) {
    __shared__ float scratch[32];
    const float *row = logits + size_t(blockIdx.x) * width;
    Sums sums = {-INFINITY, 0.0f, 0.0f};
    for (int at = threadIdx.x; at < width; at += blockDim.x) sums.add(row[at] * sharpness);
    const float most = block_max(sums.most, scratch);
    const float shrink = sums.total > 0.0f ? __expf(sums.most - most) : 0.0f;
    const float total = block_sum(sums.total * shrink, scratch);
    const float weighted = block_sum(sums.weighted * shrink, scratch);
    if (threadIdx.x == 0) {
        const int to = first + blockIdx.x;
        const float log_sum = most + logf(total);
        result[to] = row[targets[to]] * sharpness - log_sum;
        result[n + to] = log_sum - weighted / total;
        result[2 * n + to] = log_sum;
    }
}

// gradient[row, id] by the logits, given those by log-probabilities and entropies and what score_rows gave.
template <typename Real>
__device__ void unscore_rows(Real *gradient, const float *logits, const float *result, const float *by_log_probs,
                             const float *by_entropies, const unsigned *targets, float sharpness, int width, int first,
                             int n) {
    const int at_row = first + blockIdx.x;
    const size_t from = size_t(blockIdx.x) * width;
    const float entropy = result[n + at_row], log_sum = result[2 * n + at_row];
    const float by_log_prob = by_log_probs[at_row], by_entropy = by_entropies ? by_entropies[at_row] : 0.0f;
    const int target = targets[at_row];
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        const float log_prob = logits[from + at] * sharpness - log_sum, p = __expf(log_prob);
        const float by_score = by_log_prob * ((at == target ? 1.0f : 0.0f) - p) - by_entropy * p * (log_prob + entropy);
        gradient[from + at] = narrow<Real>(by_score * sharpness);
    }
}

extern "C" __global__ void unscore_rows_f32(float *gradient, const float *logits, const float *result,
                                            const float *by_log_probs, const float *by_entropies,
                                            const unsigned *targets, float sharpness, int width, int first, int n) {
    unscore_rows(gradient, logits, result, by_log_probs, by_entropies, targets, sharpness, width, first, n);
}
extern "C" __global__ void unscore_rows_bf16(bf16 *gradient, const float *logits, const float *result,
                                             const float *by_log_probs, const float *by_entropies,
                                             const unsigned *targets, float sharpness, int width, int first, int n) {
    unscore_rows(gradient, logits, result, by_log_probs, by_entropies, targets, sharpness, width, first, n);
}
