#include "parallel.hpp"

#include <dlfcn.h>

namespace fewbits {
namespace {

// PyTorch brings its own copy of libgomp, loaded for all to see. Linking ours would start a second pool, so the three
// functions of its interface are looked up in the process instead.
struct Pool {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*threads)();
};

const Pool& pool() {
  static const Pool found = {
      reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
      reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
      reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads")),
  };
  return found;
}

struct Job {
  int64_t count;
  const std::function<void(int64_t, int64_t)>& work;
};

void run_part(void* data) {
  const Job& job = *static_cast<Job*>(data);
  const int64_t thread = pool().thread(), threads = pool().threads();
  const int64_t begin = job.count * thread / threads, end = job.count * (thread + 1) / threads;
  if (begin < end) job.work(begin, end);
}

}  // namespace

bool has_pool() { return pool().parallel && pool().thread && pool().threads; }

void parallel_ranges(int threads, int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1 || !has_pool()) {
    if (count > 0) work(0, count);
    return;
  }
  Job job{count, work};
  pool().parallel(run_part, &job, static_cast<unsigned>(threads), 0);
}

}  // namespace fewbits
