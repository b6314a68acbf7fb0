// A choice for each row out of its logits: guidance, temperature, greedy or top-k, top-p, min-p, and a draw by the inverse
// of the cumulative distribution from a uniform number that the host has folded from the row's seed and place.
//
// The law is that of sampling::Distribution on the CPU, in the same order; ties at a border fall to the smaller id. The
// border of a truncation is found bit by bit: how many scores (or how much probability) lie at or above a candidate.
#include "real.cuh"

struct Shaping {
    float guidance, temperature, top_p, min_p;
    int top_k, greedy; // top_k 0 keeps all
};

struct Draw {
    const double *uniforms; // [rows, n_tokens]
    const int *step;
    unsigned *choices; // [rows, n_tokens]
    float *log_probs;  // [rows, n_tokens]
    unsigned *ids;     // [rows], or [2 rows] under guidance
    int *fault;
    int n_tokens;
    unsigned offset; // the id of the first choice
};

// Numbers as unsigned in their own order.
__device__ __forceinline__ unsigned order_of(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// How much lies at or above a border: the number of scores, or their weights relative to the greatest.
struct Above {
    const float *scores;
    int width;
    double *scratch;
    bool by_mass;
    float top;
    __device__ double weight(float x) const { return by_mass ? double(__expf(x - top)) : 1.0; }
    __device__ double at_least(unsigned border) const {
        double sum = 0.0;
        for (int at = threadIdx.x; at < width; at += blockDim.x)
            if (scores[at] != -INFINITY && order_of(scores[at]) >= border) sum += weight(scores[at]);
        return block_sum(sum, scratch);
    }
    // Scores that equal the border, up to this place.
    __device__ double equal(unsigned border, int last) const {
        double sum = 0.0;
        for (int at = threadIdx.x; at <= last; at += blockDim.x) sum += order_of(scores[at]) == border;
        return block_sum(sum, scratch);
    }
};

// Leaves the greatest scores that together are at least `wanted`, and no more of equal ones than needed.
__device__ void keep(float *scores, const Above &above, double wanted) {
    unsigned border = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const unsigned candidate = border | 1u << bit;
        if (above.at_least(candidate) >= wanted) border = candidate;
    }
    // Nothing reaches what is wanted but by rounding: all remain.
    if (border == 0) return;
    const double greater = border == 0xffffffffu ? 0.0 : above.at_least(border + 1);
    const float score = __uint_as_float(border & 0x80000000u ? border & 0x7fffffffu : ~border);
    const double needed = fmax(1.0, ceil((wanted - greater) / above.weight(score)));
    int low = 0, high = above.width - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (above.equal(border, middle) >= needed) high = middle;
        else low = middle + 1;
    }
    __syncthreads();
    for (int at = threadIdx.x; at < above.width; at += blockDim.x) {
        const unsigned order = order_of(scores[at]);
        if (order < border || (order == border && at > low)) scores[at] = -INFINITY;
    }
    __syncthreads();
}

// The logarithm of the sum of exponentials of a row.
__device__ float log_sum(const float *row, int width, float *scratch, double *scratch_double) {
    float most = -INFINITY;
    for (int at = threadIdx.x; at < width; at += blockDim.x) most = fmaxf(most, row[at]);
    most = block_max(most, scratch);
    double sum = 0.0;
    for (int at = threadIdx.x; at < width; at += blockDim.x) sum += double(__expf(row[at] - most));
    return most + float(log(block_sum(sum, scratch_double)));
}

// The place of the greatest score, the first of equal ones.
__device__ int best_of(const float *scores, int width, float top, double *scratch) {
    int low = 0, high = width - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        double found = 0.0;
        for (int at = threadIdx.x; at <= middle; at += blockDim.x) found += scores[at] == top;
        if (block_sum(found, scratch) > 0.0) high = middle;
        else low = middle + 1;
    }
    return low;
}

// A block a row; logits are `[rows, width]`, under guidance `[2 rows, width]` with the unconditional ones behind, and are
// used up.
extern "C" __global__ void __launch_bounds__(1024) sample_rows(float *logits, int rows, int width, Shaping shaping, Draw draw) {
    __shared__ float scratch[32];
    __shared__ double scratch_double[32];
    __shared__ int chosen;
    const int row = blockIdx.x, step = draw.step[0], warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const bool guided = shaping.guidance != 1.0f;
    const size_t to = size_t(row) * draw.n_tokens + step;
    float *scores = logits + size_t(row) * width;
    if (guided) {
        const float *without = logits + size_t(rows + row) * width;
        const float sum = log_sum(scores, width, scratch, scratch_double);
        const float sum_without = log_sum(without, width, scratch, scratch_double);
        for (int at = threadIdx.x; at < width; at += blockDim.x) {
            const float u = without[at] - sum_without;
            scores[at] = u + shaping.guidance * (scores[at] - sum - u);
        }
        __syncthreads();
    }
    float top = -INFINITY;
    bool broken = false;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        const float x = shaping.greedy ? scores[at] : scores[at] / shaping.temperature;
        scores[at] = x, top = fmaxf(top, x), broken = broken || x != x;
    }
    top = block_max(top, scratch);
    broken = block_max(broken ? 1.0f : 0.0f, scratch) > 0.0f;
    if (broken || top == INFINITY || top == -INFINITY) {
        // What goes on reads ids and choices all the same, until the host is told.
        if (threadIdx.x == 0) {
            draw.fault[0] = 1;
            draw.choices[to] = 0, draw.log_probs[to] = 0.0f, draw.ids[row] = draw.offset;
            if (guided) draw.ids[rows + row] = draw.offset;
        }
        return;
    }
    float log_prob = 0.0f;
    if (shaping.greedy) {
        const int best = best_of(scores, width, top, scratch_double);
        if (threadIdx.x == 0) chosen = best;
        __syncthreads();
    } else {
        if (shaping.top_k > 0 && shaping.top_k < width)
            keep(scores, Above{scores, width, scratch_double, false, top}, double(shaping.top_k));
        if (shaping.top_p < 1.0f) {
            const Above above = {scores, width, scratch_double, true, top};
            keep(scores, above, double(shaping.top_p) * above.at_least(0));
        }
        if (shaping.min_p > 0.0f) {
            const float least = top + logf(shaping.min_p);
            for (int at = threadIdx.x; at < width; at += blockDim.x)
                if (scores[at] < least) scores[at] = -INFINITY;
            __syncthreads();
        }
        // Each warp sums a run of neighbours; the draw falls into one of the runs, whose warp looks for its place.
        const int warps = blockDim.x / WARP, run = (width + warps - 1) / warps;
        const int begin = min(width, warp * run), end = min(width, begin + run);
        double sum = 0.0;
        for (int at = begin + lane; at < end; at += WARP) sum += double(__expf(scores[at] - top));
        sum = warp_sum(sum);
        __syncthreads();
        if (lane == 0) scratch_double[warp] = sum;
        __syncthreads();
        double total = 0.0;
        for (int other = 0; other < warps; other++) total += scratch_double[other];
        const double wanted = draw.uniforms[to] * total;
        // Rounding can leave the sum a hair below a draw close to 1: the last run that has any is then taken.
        double before = 0.0, upto_mine = 0.0;
        int mine = 0;
        for (int other = 0; other < warps; other++) {
            if (scratch_double[other] <= 0.0) continue;
            mine = other, upto_mine = before;
            if (wanted < before + scratch_double[other]) break;
            before += scratch_double[other];
        }
        before = upto_mine;
        if (warp == mine) {
            int found = -1, last = begin;
            for (int start = begin; start < end && found < 0; start += WARP) {
                const int at = start + lane;
                const double weight = at < end ? double(__expf(scores[at] - top)) : 0.0;
                double upto = weight;
                for (int offset = 1; offset < WARP; offset *= 2) {
                    const double left = __shfl_up_sync(ALL_LANES, upto, offset);
                    if (lane >= offset) upto += left;
                }
                const unsigned over = __ballot_sync(ALL_LANES, weight > 0.0 && wanted < before + upto);
                const unsigned any = __ballot_sync(ALL_LANES, weight > 0.0);
                if (over) found = start + __ffs(over) - 1;
                if (any) last = start + 31 - __clz(any);
                before += __shfl_sync(ALL_LANES, upto, WARP - 1);
            }
            if (lane == 0) chosen = found >= 0 ? found : last;
        }
        __syncthreads();
        log_prob = scores[chosen] - top - float(log(total));
    }
    if (threadIdx.x == 0) {
        draw.choices[to] = chosen, draw.log_probs[to] = log_prob;
        draw.ids[row] = draw.offset + chosen;
        if (guided) draw.ids[rows + row] = draw.offset + chosen;
    }
}
