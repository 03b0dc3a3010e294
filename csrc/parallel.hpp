// Threads: PyTorch's own OpenMP pool, so that its threads and ours never compete for the cores.
#pragma once

#include <cstdint>
#include <functional>

namespace fewbits {

// Whether PyTorch's pool was found in this process. Without it everything runs on the calling thread.
bool has_pool();

// Calls work(begin, end) on up to `threads` threads with equal consecutive parts of [0, count).
void parallel_ranges(int threads, int64_t count, const std::function<void(int64_t, int64_t)>& work);

}  // namespace fewbits
