// Runs a kernel's blocks.
#pragma once
#include <functional>

struct Extent {
    unsigned x, y, z;
};
// Calls `thread` once for each thread of each block, and ends the process with a word where threads wait for each other
// for ever.
void run_blocks(Extent grid, Extent block, size_t shared_bytes, const std::function<void()> &thread);
