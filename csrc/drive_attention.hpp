// Attention by a team of threads: who attends to what, and how their results are merged.
#pragma once

#include <atomic>
#include <vector>

#include "attention_job.hpp"
#include "parallel.hpp"
#include "room.hpp"

namespace fewbits {

class AttentionTeam {
 public:
  // Room for `threads` threads; called twice, before and after the room is allocated. With `own`, each thread merges
  // all rows for itself: with few of them that is faster than a meeting.
  void lay_out(Room& room, const Attention& job, int threads, bool own);

  // What each member of the team calls. Returns the result [M, Q · D]: job.out, complete, or with `own` the member's.
  const float* operator()(const Member& me);

 private:
  // Positions of a group that are given to threads; new ones count as one, the last: who has it writes them.
  int64_t slots() const { return job_.new_keys ? job_.past + 1 : job_.S(); }
  const float* attend_few(const Member& me);
  const float* attend_blocks(const Member& me);
  void merge(int64_t m, int64_t head, const Member& me, float* out);

  struct ThreadRoom {
    float *scratch, *merged;
    Partial* of_row;
  };
  Attention job_{};
  bool own_ = false, few_ = false;
  std::vector<Partial> partials_;
  std::vector<ThreadRoom> of_thread_;
  std::atomic<int64_t> next_{0};
};

// The same of heads that are ready, by a team of at most `threads`.
void attention(const Attention& job, int threads);

}  // namespace fewbits
