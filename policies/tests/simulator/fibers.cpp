// A block's threads as fibers: each runs until it waits, for its warp or for its block, and goes on when all have come.
#include "fibers.hpp"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "simulator.hpp"

SimulatedIndex threadIdx, blockIdx, blockDim, gridDim;

#if !defined(__x86_64__)
#error "fibers are switched by x86-64 code; another processor needs its own `switch_stacks`"
#endif

// Keeps what a call must keep, leaves this stack at *from and goes on where `to` was left.
extern "C" void switch_stacks(void **from, void *to);
asm(R"(
.text
.globl switch_stacks
.type switch_stacks, @function
switch_stacks:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
.size switch_stacks, .-switch_stacks
)");

namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr unsigned MOST_THREADS = 1024;

enum class Wait { Nothing, Warp, Block, Ended };

struct Fiber {
    std::vector<char> stack;
    void *place;
    Wait wait;
    SimulatedIndex index;
};

std::vector<Fiber> fibers;
std::vector<unsigned char> shared;
Fiber *running = nullptr;
void *scheduler = nullptr;
const std::function<void()> *body = nullptr;
// What the lanes of each warp gave, for two exchanges in turn.
uint64_t given[MOST_THREADS / 32][2][32];
unsigned turns[MOST_THREADS];
// Every other launch goes through its warps and threads from the last to the first: what reads before a barrier what
// another thread has yet to write is found in one of the two orders.
bool backwards = false;
// Every so many launches products are made by passing numbers around, which takes many times as long; a prime, so that no
// kernel of a repeated pass is left out.
constexpr unsigned BY_LANES_EVERY = 7;
unsigned n_launches = 0;

void give_way(Wait wait) {
    Fiber *me = running;
    me->wait = wait;
    switch_stacks(&me->place, scheduler);
    running = me;
    threadIdx = me->index;
}

void begin() {
    (*body)();
    running->wait = Wait::Ended;
    switch_stacks(&running->place, scheduler);
    std::abort();
}

void prepare(Fiber &fiber, unsigned thread) {
    if (fiber.stack.empty()) fiber.stack.resize(STACK_BYTES);
    fiber.wait = Wait::Nothing;
    fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
    // Six registers, then where `ret` goes; the stack is as after a call: 8 bytes off a multiple of 16.
    auto top = reinterpret_cast<uintptr_t>(fiber.stack.data() + STACK_BYTES) & ~uintptr_t(15);
    void **place = reinterpret_cast<void **>(top - 16);
    *place = reinterpret_cast<void *>(&begin);
    fiber.place = place - 6;
    turns[thread] = 0;
}

// Whether any of the fibers waits so.
bool any(unsigned first, unsigned end, Wait wait) {
    for (unsigned thread = first; thread < end; thread++)
        if (fibers[thread].wait == wait) return true;
    return false;
}

void release(unsigned first, unsigned end, Wait wait) {
    for (unsigned thread = first; thread < end; thread++)
        if (fibers[thread].wait == wait) fibers[thread].wait = Wait::Nothing;
}

void run_warp(unsigned first, unsigned end) {
    for (;;) {
        for (unsigned turn = first; turn < end; turn++) {
            const unsigned thread = backwards ? first + end - 1 - turn : turn;
            if (fibers[thread].wait != Wait::Nothing) continue;
            running = &fibers[thread];
            threadIdx = running->index;
            switch_stacks(&scheduler, running->place);
        }
        if (!any(first, end, Wait::Warp)) return;
        if (any(first, end, Wait::Block)) {
            std::fprintf(stderr, "a warp's threads part: some wait for their warp and some for their block\n");
            std::abort();
        }
        release(first, end, Wait::Warp);
    }
}

void run_block(unsigned threads) {
    for (unsigned thread = 0; thread < threads; thread++) prepare(fibers[thread], thread);
    do {
        release(0, threads, Wait::Block);
        const unsigned warps = (threads + 31) / 32;
        for (unsigned turn = 0; turn < warps; turn++) {
            const unsigned first = 32 * (backwards ? warps - 1 - turn : turn);
            run_warp(first, std::min(threads, first + 32));
        }
        if (any(0, threads, Wait::Block) && any(0, threads, Wait::Ended)) {
            std::fprintf(stderr, "some threads wait for their block and others have ended\n");
            std::abort();
        }
    } while (any(0, threads, Wait::Block));
}

} // namespace

void __syncthreads() { give_way(Wait::Block); }

void *simulated_dynamic_shared() { return shared.data(); }

const uint64_t *simulated_exchange(uint64_t mine) {
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    uint64_t *all = given[thread / 32][turns[thread]++ % 2];
    all[thread % 32] = mine;
    give_way(Wait::Warp);
    return all;
}

bool simulated_by_lanes() { return n_launches % BY_LANES_EVERY == 0; }

void simulated_mma(float (&c)[4], const float (&a)[8], const float (&b)[4]) {
    static float all_a[MOST_THREADS][8], all_b[MOST_THREADS][4];
    const unsigned thread = threadIdx.x, first = thread / 32 * 32, lane = thread % 32;
    // Twice, so that nobody overwrites what another still reads.
    simulated_exchange(0);
    std::memcpy(all_a[thread], a, sizeof a);
    std::memcpy(all_b[thread], b, sizeof b);
    simulated_exchange(0);
    for (int at = 0; at < 4; at++) {
        const unsigned row = lane / 4 + 8 * (at / 2), column = 2 * (lane % 4) + at % 2;
        for (unsigned k = 0; k < 16; k++) {
            const unsigned a_lane = first + row % 8 * 4 + k % 8 / 2, a_place = 2 * (row / 8 + 2 * (k / 8)) + k % 2;
            const unsigned b_lane = first + column * 4 + k % 8 / 2, b_place = 2 * (k / 8) + k % 2;
            c[at] += all_a[a_lane][a_place] * all_b[b_lane][b_place];
        }
    }
}

void run_blocks(Extent grid, Extent block, size_t shared_bytes, const std::function<void()> &thread) {
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > MOST_THREADS) {
        std::fprintf(stderr, "a block of %u threads\n", threads);
        std::abort();
    }
    if (fibers.empty()) fibers.resize(MOST_THREADS);
    // What a block finds in its memory means nothing.
    shared.assign(shared_bytes + 16, 0xff);
    blockDim = {block.x, block.y, block.z};
    gridDim = {grid.x, grid.y, grid.z};
    body = &thread;
    backwards = n_launches++ % 2 == 1;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                run_block(threads);
            }
}
