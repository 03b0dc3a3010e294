// A decoder layer is a chain of stages; the threads meet between them:
//
//   x -> RMSNorm, quantize | q k v | rotate, into the cache, attend | merge, quantize | o, + x = h
//   h -> RMSNorm, quantize | silu(gate) · up | quantize | down, + h
//
// With few rows each thread normalizes, merges and quantizes all of them for itself: that is faster than a meeting.
#include "drive_decoder.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "drive.hpp"
#include "parallel.hpp"

namespace fewbits {
namespace {

constexpr int64_t kOwnRows = 4;                   // at most so many rows are every thread's own business
constexpr int64_t kFewQueries = 16;               // of a key head: more are worth transposing the keys
constexpr int64_t kRowsAtOnce = 42 * kPanelRows;  // the widest intermediate result has so many rows
constexpr int64_t kWorthAThread = 1 << 17;        // multiply-adds

// Room for one thread, or for all: pieces of one allocation, each on a cache line of its own.
class Room {
 public:
  template <class T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory_ ? reinterpret_cast<T*>(start_ + at) : nullptr;
  }
  // After a first round of `take`, which only counts.
  void allocate() {
    memory_.reset(new char[static_cast<size_t>(bytes_ + 64)]);
    start_ = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
    bytes_ = 0;
  }

 private:
  std::unique_ptr<char[]> memory_;
  char* start_ = nullptr;
  int64_t bytes_ = 0;
};

struct ThreadRoom {
  uint8_t* tiles;
  float *token_scales, *row, *attention, *merged;
  Partial* of_row;
};

class Run {
 public:
  Run(const DecoderLayer& layer, const DecoderCall& call, int threads)
      : layer_(layer), call_(call), kernels_(*chosen().kernels), M_(call.B * call.T), own_(M_ <= kOwnRows) {
    width_ = (layer.Q + 2 * layer.G) * layer.D;
    F_ = layer.down.K;
    most_K_ = std::max({layer.H, layer.Q * layer.D, F_});
    chunk_ = std::min(M_, kRowsAtOnce);
    few_ = call.T * (layer.Q / layer.G) <= kFewQueries;
    const int64_t macs = M_ * (width_ * layer.H + layer.H * layer.Q * layer.D + 3 * F_ * layer.H);
    threads_ = static_cast<int>(std::clamp<int64_t>(macs / kWorthAThread, 1, threads));
    of_thread_.resize(static_cast<size_t>(threads_));
    lay_out();
    room_.allocate();
    lay_out();
  }

  void operator()() {
    parallel_team(threads_, [this](const Member& me) { member(me); });
  }

 private:
  void lay_out() {
    const int64_t QD = layer_.Q * layer_.D, padded = (most_K_ + 3) / 4 * 4;
    qkv_ = room_.take<float>(M_ * width_);
    attended_ = room_.take<float>(M_ * QD);
    gated_ = room_.take<float>(chunk_ * F_);
    tiles_ = room_.take<uint8_t>(chunk_ * padded);
    token_scales_ = room_.take<float>(chunk_);
    const Attention job = attention();
    const int64_t groups = call_.B * layer_.G, rows = job.rows();
    const int64_t scratch = few_ ? rows * layer_.D : kernels_.attention_scratch(job);
    partials_.resize(few_ ? static_cast<size_t>(threads_ * groups) : 0);
    for (Partial& partial : partials_)
      partial = {room_.take<float>(rows * layer_.D), room_.take<float>(rows), room_.take<float>(rows)};
    for (ThreadRoom& mine : of_thread_)
      mine = {room_.take<uint8_t>(own_ ? M_ * padded : 0), room_.take<float>(own_ ? M_ : 0),
              room_.take<float>(2 * most_K_ + 16),         room_.take<float>(scratch),
              room_.take<float>(own_ ? M_ * QD : 0),       room_.take<Partial>(threads_)};
  }

  Attention attention() const {
    return {qkv_,
            width_,
            attended_,
            call_.keys,
            call_.values,
            call_.key_batch,
            call_.key_head,
            call_.value_batch,
            call_.value_head,
            call_.B,
            call_.T,
            layer_.Q,
            layer_.G,
            layer_.D,
            call_.past,
            call_.cos,
            call_.sin,
            call_.R,
            call_.rotary_batch,
            layer_.interleaved,
            layer_.q_norm,
            layer_.k_norm,
            layer_.head_eps,
            call_.mask,
            call_.mask_batch,
            call_.mask_row,
            layer_.scale};
  }

  void member(const Member& me) {
    for (int64_t m = 0; m < M_; m += chunk_) {
      const int64_t rows = std::min(chunk_, M_ - m);
      const Tokens tokens = tokens_of({call_.x + m * layer_.H, layer_.input_norm, layer_.eps}, rows, layer_.H, me);
      multiply({tokens, layer_.qkv, 3, qkv_ + m * width_, width_, nullptr, false}, me);
      me.meet();
    }
    const float* attended = few_ ? attend_few(me) : attend_blocks(me);
    for (int64_t m = 0; m < M_; m += chunk_) after_attention(attended, m, std::min(chunk_, M_ - m), me);
  }

  void after_attention(const float* attended, int64_t m, int64_t rows, const Member& me) {
    const int64_t H = layer_.H, QD = layer_.Q * layer_.D;
    float* out = call_.out + m * H;
    const Tokens heads = tokens_of({attended + m * QD, nullptr, 0}, rows, QD, me);
    multiply({heads, &layer_.o, 1, out, H, call_.x + m * H, false}, me);
    me.meet();
    const Tokens normed = tokens_of({out, layer_.post_norm, layer_.post_eps}, rows, H, me);
    multiply({normed, layer_.gate_up, 2, gated_, F_, nullptr, true}, me);
    me.meet();
    const Tokens gated = tokens_of({gated_, nullptr, 0}, rows, F_, me);
    multiply({gated, &layer_.down, 1, out, H, out, false}, me);
    if (m + rows < M_) me.meet();
  }

  Tokens tokens_of(const Rows& rows, int64_t M, int64_t K, const Member& me) {
    ThreadRoom& mine = of_thread_[static_cast<size_t>(me.index)];
    const Tokens tokens{own_ ? mine.tiles : tiles_, own_ ? mine.token_scales : token_scales_, M, K};
    kernels_.make_tokens(rows, tokens, mine.row, own_ ? 0 : me.begin(M), own_ ? M : me.end(M));
    if (!own_) me.meet();
    return tokens;
  }

  void multiply(const Linear& job, const Member& me) {
    kernels_.linear(job, me.begin(job.units()), me.end(job.units()));
  }

  // The positions of all texts and groups in a row are split evenly; a group's new ones count as one, its last.
  const float* attend_few(const Member& me) {
    const Attention job = attention();
    const ThreadRoom& mine = of_thread_[static_cast<size_t>(me.index)];
    const int64_t groups = job.B * job.G, slots = job.past + 1;
    for (int64_t at = me.begin(groups * slots); at < me.end(groups * slots);) {
      const int64_t group = at / slots, from = at % slots;
      const int64_t to = std::min(slots, from + me.end(groups * slots) - at);
      if (to == slots) kernels_.fill_caches(job, group * job.T, (group + 1) * job.T);
      kernels_.attend_few(job, group / job.G, group % job.G, from, to == slots ? job.S() : to, mine.attention,
                          partials_[static_cast<size_t>(me.index * groups + group)]);
      at += to - from;
    }
    me.meet();
    float* merged = own_ ? mine.merged : attended_;
    for (int64_t m = own_ ? 0 : me.begin(M_); m < (own_ ? M_ : me.end(M_)); ++m)
      for (int64_t head = 0; head < job.Q; ++head) merge(job, m, head, me, merged + (m * job.Q + head) * job.D);
    if (!own_) me.meet();
    return merged;
  }

  void merge(const Attention& job, int64_t m, int64_t head, const Member& me, float* out) {
    const int64_t repeats = job.Q / job.G, groups = job.B * job.G, slots = job.past + 1, total = groups * slots;
    const int64_t group = m / job.T * job.G + head / repeats, row = m % job.T * repeats + head % repeats;
    Partial* found = of_thread_[static_cast<size_t>(me.index)].of_row;
    int64_t count = 0;
    for (int64_t i = 0; i < me.count; ++i)
      if (total * i / me.count < (group + 1) * slots && total * (i + 1) / me.count > group * slots)
        found[count++] = partials_[static_cast<size_t>(i * groups + group)];
    kernels_.merge_partials(found, count, row, job.D, out);
  }

  const float* attend_blocks(const Member& me) {
    const Attention job = attention();
    const int64_t pairs = job.B * job.G * job.T, units = kernels_.attention_units(job);
    kernels_.fill_caches(job, me.begin(pairs), me.end(pairs));
    me.meet();
    for (int64_t unit = next_++; unit < units; unit = next_++)
      kernels_.attend_block(job, unit, of_thread_[static_cast<size_t>(me.index)].attention);
    me.meet();
    return attended_;
  }

  const DecoderLayer& layer_;
  const DecoderCall& call_;
  const Kernels& kernels_;
  int64_t M_, width_, F_, most_K_, chunk_;
  bool own_, few_;
  int threads_;
  Room room_;
  float *qkv_, *attended_, *gated_, *token_scales_;
  uint8_t* tiles_;
  std::vector<Partial> partials_;
  std::vector<ThreadRoom> of_thread_;
  std::atomic<int64_t> next_{0};
};

}  // namespace

void decoder_layer(const DecoderLayer& layer, const DecoderCall& call, int threads) {
  if (call.B * call.T > 0) Run(layer, call, threads)();
}

}  // namespace fewbits
