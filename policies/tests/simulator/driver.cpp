// The part of CUDA's driver and of cuBLAS that candle and grpo call, on the host's memory and in the caller's thread.
//
// A stream does what it is told at once. While it is captured it keeps it instead, and a graph does it at each launch, so
// that what a graph reads from changed memory is seen. Kernels are looked up by name among those that were compiled with
// this file; one that is not there is an error, as on a card.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fibers.hpp"
#include "simulator.hpp"
#include "table.hpp"

namespace {

enum Status : int { Success = 0, InvalidValue = 1, OutOfMemory = 2, NotFound = 500 };

using Work = std::function<void()>;
using Graph = std::vector<Work>;

std::recursive_mutex mutex;
std::unique_ptr<Graph> captured;
size_t allocated = 0;
std::map<void *, size_t> blocks;
constexpr size_t TOTAL_BYTES = size_t(8) << 30;

int run(Work work) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (captured) captured->push_back(std::move(work));
    else work();
    return Success;
}

// What a card forbids while a stream is captured.
void not_while_capturing(const char *what) {
    if (!captured) return;
    std::fprintf(stderr, "%s while a stream is captured\n", what);
    std::abort();
}

int allocate(void **to, size_t bytes) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    not_while_capturing("memory is allocated");
    if (bytes == 0) return InvalidValue;
    if (allocated + bytes > TOTAL_BYTES) return OutOfMemory;
    *to = std::aligned_alloc(256, (bytes + 511) / 256 * 256);
    if (!*to) return OutOfMemory;
    // Fresh memory means nothing.
    std::memset(*to, 0xff, bytes);
    blocks[*to] = bytes, allocated += bytes;
    return Success;
}

int release(void *place) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    not_while_capturing("memory is freed");
    auto block = blocks.find(place);
    if (block == blocks.end()) return InvalidValue;
    allocated -= block->second;
    blocks.erase(block);
    std::free(place);
    return Success;
}

int copy(void *to, const void *from, size_t bytes) {
    return run([=] { std::memmove(to, from, bytes); });
}

int dummy;
template <typename T> int give(T **to) {
    *to = reinterpret_cast<T *>(&dummy);
    return Success;
}

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int cuInit(unsigned) { return Success; }
EXPORT int cuDriverGetVersion(int *version) { return *version = 13000, Success; }
EXPORT int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? Success : 101; }
EXPORT int cuDeviceGetCount(int *count) { return *count = 1, Success; }
EXPORT int cuDeviceGetName(char *name, int size, int) { return std::snprintf(name, size, "simulated on a CPU"), Success; }
EXPORT int cuDeviceGetAttribute(int *value, int, int) { return *value = 1, Success; }
EXPORT int cuDevicePrimaryCtxRetain(void **context, int) { return give(context); }
EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return Success; }
EXPORT int cuCtxSetCurrent(void *) { return Success; }
EXPORT int cuCtxGetCurrent(void **context) { return give(context); }
EXPORT int cuCtxSynchronize() { return Success; }
EXPORT int cuGetErrorName(int status, const char **name) {
    static thread_local std::string text;
    text = "simulated status " + std::to_string(status);
    return *name = text.c_str(), Success;
}
EXPORT int cuGetErrorString(int status, const char **text) { return cuGetErrorName(status, text); }

EXPORT int cuStreamCreate(void **stream, unsigned) { return give(stream); }
EXPORT int cuStreamCreateWithPriority(void **stream, unsigned, int) { return give(stream); }
EXPORT int cuStreamDestroy_v2(void *) { return Success; }
EXPORT int cuStreamSynchronize(void *) {
    not_while_capturing("a stream is waited for");
    return Success;
}
EXPORT int cuStreamWaitEvent(void *, void *, unsigned) { return Success; }
EXPORT int cuStreamIsCapturing(void *, int *status) { return *status = captured ? 1 : 0, Success; }
EXPORT int cuStreamBeginCapture_v2(void *, int) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (captured) return 900;
    captured = std::make_unique<Graph>();
    return Success;
}
EXPORT int cuStreamEndCapture(void *, void **graph) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (!captured) return 901;
    *graph = captured.release();
    return Success;
}
EXPORT int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long) {
    return *exec = new Graph(*static_cast<Graph *>(graph)), Success;
}
EXPORT int cuGraphDestroy(void *graph) { return delete static_cast<Graph *>(graph), Success; }
EXPORT int cuGraphExecDestroy(void *graph) { return delete static_cast<Graph *>(graph), Success; }
EXPORT int cuGraphUpload(void *, void *) { return Success; }
EXPORT int cuGraphLaunch(void *exec, void *) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    for (const Work &work : *static_cast<Graph *>(exec)) work();
    return Success;
}

EXPORT int cuEventCreate(void **event, unsigned) { return give(event); }
EXPORT int cuEventDestroy_v2(void *) { return Success; }
EXPORT int cuEventRecord(void *, void *) { return Success; }
EXPORT int cuEventSynchronize(void *) { return Success; }

EXPORT int cuMemAllocAsync(void **to, size_t bytes, void *) { return allocate(to, bytes); }
EXPORT int cuMemAlloc_v2(void **to, size_t bytes) { return allocate(to, bytes); }
EXPORT int cuMemFreeAsync(void *place, void *) { return release(place); }
EXPORT int cuMemFree_v2(void *place) { return release(place); }
EXPORT int cuMemGetInfo_v2(size_t *free, size_t *total) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return *total = TOTAL_BYTES, *free = TOTAL_BYTES - allocated, Success;
}
EXPORT int cuMemsetD8Async(void *place, unsigned char value, size_t n, void *) {
    return run([=] { std::memset(place, value, n); });
}
EXPORT int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *) {
    not_while_capturing("numbers are sent");
    return copy(to, from, bytes);
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *) {
    not_while_capturing("numbers are fetched");
    return copy(to, from, bytes);
}
EXPORT int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *) { return copy(to, from, bytes); }
EXPORT int cuMemHostAlloc(void **to, size_t bytes, unsigned) { return *to = std::malloc(bytes), *to ? Success : OutOfMemory; }
EXPORT int cuMemFreeHost(void *place) { return std::free(place), Success; }
EXPORT int cuDeviceGetDefaultMemPool(void **pool, int) { return give(pool); }
EXPORT int cuMemPoolSetAttribute(void *, int, void *) { return Success; }
EXPORT int cuMemPoolGetAttribute(void *, int, void *value) { return *static_cast<uint64_t *>(value) = 0, Success; }

EXPORT int cuModuleLoadData(void **module, const void *) { return give(module); }
EXPORT int cuModuleLoad(void **module, const char *) { return give(module); }
EXPORT int cuModuleUnload(void *) { return Success; }
EXPORT int cuModuleGetFunction(void **function, void *, const char *name) {
    for (size_t at = 0; at < n_kernels; at++)
        if (std::string(kernel_table[at].name) == name)
            return *function = const_cast<Kernel *>(&kernel_table[at]), Success;
    std::fprintf(stderr, "no kernel is simulated by the name of %s\n", name);
    return NotFound;
}
EXPORT int cuFuncSetAttribute(void *, int, int) { return Success; }
EXPORT int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared_bytes, void *, void **arguments, void **) {
    if (gx * gy * gz == 0 || bx * by * bz == 0 || gy > 65535 || gz > 65535 || shared_bytes > 48u << 10) return InvalidValue;
    const auto thread = static_cast<const Kernel *>(function)->bind(arguments);
    return run([=] { run_blocks({gx, gy, gz}, {bx, by, bz}, shared_bytes, thread); });
}

// cuBLAS: matrices lie in columns.
namespace {

float number(const void *from, size_t at, int kind) {
    if (kind == 0) return static_cast<const float *>(from)[at];
    return __uint_as_float(unsigned(static_cast<const unsigned short *>(from)[at]) << 16);
}

void set_number(void *to, size_t at, int kind, float x) {
    if (kind == 0) static_cast<float *>(to)[at] = x;
    else static_cast<unsigned short *>(to)[at] = (unsigned short)simulated_to_bf16(x);
}

// Kinds are cudaDataType's: 0 for float, 14 for bf16.
struct Matrix {
    const void *from;
    int kind, leading;
    bool transposed;
    float at(int row, int column) const {
        return number(from, transposed ? column + size_t(row) * leading : row + size_t(column) * leading, kind);
    }
};

void multiply(int m, int n, int k, float alpha, Matrix a, Matrix b, float beta, void *c, int kind, int leading) {
    std::vector<float> left(size_t(m) * k), right(size_t(n) * k);
    for (int row = 0; row < m; row++)
        for (int i = 0; i < k; i++) left[size_t(row) * k + i] = a.at(row, i);
    for (int column = 0; column < n; column++)
        for (int i = 0; i < k; i++) right[size_t(column) * k + i] = b.at(i, column);
    for (int column = 0; column < n; column++)
        for (int row = 0; row < m; row++) {
            float sum = 0.0f;
            for (int i = 0; i < k; i++) sum += left[size_t(row) * k + i] * right[size_t(column) * k + i];
            const size_t at = row + size_t(column) * leading;
            set_number(c, at, kind, alpha * sum + (beta == 0.0f ? 0.0f : beta * number(c, at, kind)));
        }
}

} // namespace

EXPORT int cublasCreate_v2(void **handle) { return give(handle); }
EXPORT int cublasDestroy_v2(void *) { return Success; }
EXPORT int cublasSetStream_v2(void *, void *) { return Success; }
EXPORT int cublasSetWorkspace_v2(void *, void *, size_t) { return Success; }
EXPORT int cublasSetMathMode(void *, int) { return Success; }
EXPORT int cublasGemmStridedBatchedEx(void *, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a,
                                      int kind_a, int lda, long long step_a, const void *b, int kind_b, int ldb,
                                      long long step_b, const void *beta, void *c, int kind_c, int ldc,
                                      long long step_c, int batch, int, int) {
    const float by = *static_cast<const float *>(alpha), keep = *static_cast<const float *>(beta);
    const auto offset = [](const void *from, long long at, int kind) {
        return static_cast<const char *>(from) + at * (kind == 0 ? 4 : 2);
    };
    return run([=] {
        for (long long i = 0; i < batch; i++)
            multiply(m, n, k, by, {offset(a, i * step_a, kind_a), kind_a, lda, op_a != 0},
                     {offset(b, i * step_b, kind_b), kind_b, ldb, op_b != 0}, keep,
                     const_cast<char *>(offset(c, i * step_c, kind_c)), kind_c, ldc);
    });
}
EXPORT int cublasGemmEx(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a,
                        int kind_a, int lda, const void *b, int kind_b, int ldb, const void *beta, void *c, int kind_c,
                        int ldc, int compute, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, kind_a, lda, 0, b, kind_b, ldb, 0, beta, c,
                                      kind_c, ldc, 0, 1, compute, algorithm);
}

EXPORT int curandCreateGenerator(void **generator, int) { return give(generator); }
EXPORT int curandDestroyGenerator(void *) { return Success; }
EXPORT int curandSetStream(void *, void *) { return Success; }
EXPORT int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return Success; }
