#include "drive_attention.hpp"

#include <algorithm>

#include "kernels.hpp"

namespace fewbits {
namespace {

constexpr int64_t kFewQueries = 16;         // of a key head: more are worth transposing the keys,
constexpr int64_t kMostQueries = 128;       // but not where there are too few blocks of queries for the threads
constexpr int64_t kWorthAThread = 1 << 16;  // multiply-adds

}  // namespace

void AttentionTeam::lay_out(Room& room, const Attention& job, int threads, bool own) {
  const Kernels& kernels = *chosen().kernels;
  job_ = job;
  own_ = own;
  few_ = job.rows() <= kFewQueries || (job.rows() <= kMostQueries && kernels.attention_units(job) < 2 * threads);
  const int64_t groups = job.B * job.G, rows = job.rows();
  const int64_t scratch = few_ ? rows * job.D : kernels.attention_scratch(job);
  partials_.resize(few_ ? static_cast<size_t>(threads * groups) : 0);
  for (Partial& partial : partials_)
    partial = {room.take<float>(rows * job.D), room.take<float>(rows), room.take<float>(rows)};
  of_thread_.resize(static_cast<size_t>(threads));
  for (ThreadRoom& mine : of_thread_)
    mine = {room.take<float>(scratch), room.take<float>(own && few_ ? job.B * job.T * job.Q * job.D : 0),
            room.take<Partial>(few_ ? threads : 0)};
}

const float* AttentionTeam::operator()(const Member& me) { return few_ ? attend_few(me) : attend_blocks(me); }

// The positions of all texts and groups in a row are split evenly.
const float* AttentionTeam::attend_few(const Member& me) {
  const Kernels& kernels = *chosen().kernels;
  const ThreadRoom& mine = of_thread_[static_cast<size_t>(me.index)];
  const int64_t groups = job_.B * job_.G, slots = this->slots(), M = job_.B * job_.T;
  for (int64_t at = me.begin(groups * slots); at < me.end(groups * slots);) {
    const int64_t group = at / slots, from = at % slots;
    const int64_t to = std::min(slots, from + me.end(groups * slots) - at);
    if (to == slots) kernels.fill_caches(job_, group * job_.T, (group + 1) * job_.T, mine.scratch);
    kernels.attend_few(job_, group / job_.G, group % job_.G, from, to == slots ? job_.S() : to, mine.scratch,
                       partials_[static_cast<size_t>(me.index * groups + group)]);
    at += to - from;
  }
  me.meet();
  float* merged = own_ ? mine.merged : job_.out;
  for (int64_t m = own_ ? 0 : me.begin(M); m < (own_ ? M : me.end(M)); ++m)
    for (int64_t head = 0; head < job_.Q; ++head) merge(m, head, me, merged + (m * job_.Q + head) * job_.D);
  if (!own_) me.meet();
  return merged;
}

// One head of row m, from the results of all threads that saw a part of its group.
void AttentionTeam::merge(int64_t m, int64_t head, const Member& me, float* out) {
  const int64_t repeats = job_.repeats(), groups = job_.B * job_.G, slots = this->slots(), total = groups * slots;
  const int64_t group = m / job_.T * job_.G + head / repeats, row = m % job_.T * repeats + head % repeats;
  Partial* found = of_thread_[static_cast<size_t>(me.index)].of_row;
  int64_t count = 0;
  for (int64_t i = 0; i < me.count; ++i)
    if (total * i / me.count < (group + 1) * slots && total * (i + 1) / me.count > group * slots)
      found[count++] = partials_[static_cast<size_t>(i * groups + group)];
  chosen().kernels->merge_partials(found, count, row, job_.D, out);
}

const float* AttentionTeam::attend_blocks(const Member& me) {
  const Kernels& kernels = *chosen().kernels;
  float* scratch = of_thread_[static_cast<size_t>(me.index)].scratch;
  const int64_t tokens = job_.B * job_.G * job_.T, units = kernels.attention_units(job_);
  kernels.fill_caches(job_, me.begin(tokens), me.end(tokens), scratch);
  me.meet();
  for (int64_t unit = next_++; unit < units; unit = next_++) kernels.attend_block(job_, unit, scratch);
  me.meet();
  return job_.out;
}

void attention(const Attention& job, int threads) {
  if (job.B * job.T == 0) return;
  const int64_t macs = 2 * job.B * job.T * job.Q * job.D * job.S();
  threads = static_cast<int>(std::clamp<int64_t>(macs / kWorthAThread, 1, threads));
  AttentionTeam team;
  Room room;
  team.lay_out(room, job, threads, false);
  room.allocate();
  team.lay_out(room, job, threads, false);
  parallel_team(threads, [&](const Member& me) { team(me); });
}

}  // namespace fewbits
