#include "parallel.hpp"

#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

struct Team {
  const std::function<void(const Member&)>& work;
  Member::Meeting meeting;
};

// A forked process has the pool's data but none of its threads: work given to them would never be done. Who started
// the pool, PyTorch or we, is not to be seen; a process that was alone when it forked has none.
bool alone = false, lost = false;

bool has_one_thread() {
  DIR* tasks = opendir("/proc/self/task");
  if (!tasks) return false;
  int count = 0;
  while (const dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
  closedir(tasks);
  return count == 1;
}

const bool watched = pthread_atfork([] { alone = has_one_thread(); }, nullptr, [] { lost = lost || !alone; }) == 0;

bool has_threads() { return watched && !lost && has_pool(); }

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void run_part(void* data) {
  const Job& job = *static_cast<Job*>(data);
  const int64_t thread = pool().thread(), threads = pool().threads();
  const int64_t begin = job.count * thread / threads, end = job.count * (thread + 1) / threads;
  if (begin < end) job.work(begin, end);
}

void run_member(void* data) {
  Team& team = *static_cast<Team*>(data);
  team.work(Member(pool().thread(), pool().threads(), team.meeting));
}

}  // namespace

bool has_pool() { return pool().parallel && pool().thread && pool().threads; }

void parallel_ranges(int threads, int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1 || !has_threads()) {
    if (count > 0) work(0, count);
    return;
  }
  Job job{count, work};
  pool().parallel(run_part, &job, static_cast<unsigned>(threads), 0);
}

void Member::meet() const {
  constexpr int kSpins = 20000;  // some 0.2 ms; by then a thread that is waited for has lost its core
  const int round = meeting_.round.load(std::memory_order_relaxed);
  if (meeting_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
    meeting_.arrived.store(0, std::memory_order_relaxed);
    meeting_.round.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; meeting_.round.load(std::memory_order_acquire) == round; ++spins) {
    if (spins < kSpins)
      relax();
    else
      sched_yield();
  }
}

void parallel_team(int threads, const std::function<void(const Member&)>& work) {
  Team team{work, {}};
  if (threads <= 1 || !has_threads()) return work(Member(0, 1, team.meeting));
  pool().parallel(run_member, &team, static_cast<unsigned>(threads), 0);
}

}  // namespace fewbits
