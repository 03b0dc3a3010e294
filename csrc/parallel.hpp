// Threads: PyTorch's own OpenMP pool, so that its threads and ours never compete for the cores.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace fewbits {

// Whether PyTorch's pool was found in this process. Without it everything runs on the calling thread.
bool has_pool();

// Calls work(begin, end) on up to `threads` threads with equal consecutive parts of [0, count).
void parallel_ranges(int threads, int64_t count, const std::function<void(int64_t, int64_t)>& work);

// One thread of a team that goes through stages together.
class Member {
 public:
  // What the members of a team share.
  struct Meeting {
    std::atomic<int> arrived{0};
    std::atomic<int> round{0};
  };

  Member(int index, int count, Meeting& meeting) : index(index), count(count), meeting_(meeting) {}

  // Waits for the others, spinning: a stage of a decode step is shorter than it takes to sleep and wake up.
  void meet() const;

  // This member's part of [0, total).
  int64_t begin(int64_t total) const { return total * index / count; }
  int64_t end(int64_t total) const { return total * (index + 1) / count; }

  const int index, count;

 private:
  Meeting& meeting_;
};

// Calls work on up to `threads` threads at once.
void parallel_team(int threads, const std::function<void(const Member&)>& work);

}  // namespace fewbits
