// A decoder layer is a chain of stages; the threads meet between them:
//
//   x -> RMSNorm, quantize | q k v | rotate, into the cache, attend | merge, quantize | o, + x = h
//   h -> RMSNorm, quantize | silu(gate) · up | quantize | down, + h
//
// With few rows each thread normalizes, merges and quantizes all of them for itself: that is faster than a meeting.
#include "drive_decoder.hpp"

#include <algorithm>
#include <array>
#include <span>
#include <vector>

#include "drive.hpp"
#include "drive_attention.hpp"
#include "parallel.hpp"
#include "room.hpp"

namespace fewbits {
namespace {

constexpr int64_t kOwnRows = 4;                   // at most so many rows are every thread's own business
constexpr int64_t kRowsAtOnce = 42 * kPanelRows;  // the widest intermediate result has so many rows
constexpr int64_t kWorthAThread = 1 << 17;        // multiply-adds

// Room for tokens of one kind: as much as any weight of the layer needs.
struct Place {
  uint8_t* tiles;
  float* scales;
  int32_t* sums;
};

// A stage has at most three weights, which may each need tokens of their own.
using Places = std::array<Place, 3>;

struct ThreadRoom {
  Places places;
  float* row;
};

class Run {
 public:
  Run(const DecoderLayer& layer, const DecoderCall& call, int threads)
      : layer_(layer), call_(call), kernels_(*chosen().kernels), M_(call.B * call.T), own_(M_ <= kOwnRows) {
    width_ = (layer.Q + 2 * layer.G) * layer.D;
    F_ = layer.down.K;
    most_K_ = std::max({layer.H, layer.Q * layer.D, F_});
    chunk_ = std::min(M_, kRowsAtOnce);
    const int64_t macs = M_ * (width_ * layer.H + layer.H * layer.Q * layer.D + 3 * F_ * layer.H);
    threads_ = static_cast<int>(std::clamp<int64_t>(macs / kWorthAThread, 1, threads));
    of_thread_.resize(static_cast<size_t>(threads_));
    look_at({layer.qkv, 3});
    look_at({&layer.o, 1});
    look_at({layer.gate_up, 2});
    look_at({&layer.down, 1});
    lay_out();
    room_.allocate();
    lay_out();
  }

  void operator()() {
    parallel_team(threads_, [this](const Member& me) { member(me); });
  }

 private:
  // How much room the tokens of a stage need.
  void look_at(std::span<const Weight> stage) {
    int64_t kinds = 0;
    for (size_t i = 0; i < stage.size(); ++i) {
      const Tokens tokens{stage[i].needs, nullptr, nullptr, nullptr, M_, stage[i].K};
      row_bytes_ = std::max(row_bytes_, tokens.row_bytes());
      groups_ = std::max(groups_, tokens.needs.groups);
      kinds += first_alike(stage.data(), i) == i;
    }
    most_kinds_ = std::max(most_kinds_, kinds);
  }

  // The first weight of a stage that needs the tokens which weight i needs.
  static size_t first_alike(const Weight* stage, size_t i) {
    size_t first = 0;
    while (stage[first].needs != stage[i].needs) ++first;
    return first;
  }

  void lay_out() {
    const int64_t QD = layer_.Q * layer_.D;
    qkv_ = room_.take<float>(M_ * width_);
    attended_ = room_.take<float>(M_ * QD);
    gated_ = room_.take<float>(chunk_ * F_);
    places_ = places_for(own_ ? 0 : chunk_);
    attend_.lay_out(room_, attention(), threads_, own_);
    for (ThreadRoom& mine : of_thread_) mine = {places_for(own_ ? M_ : 0), room_.take<float>(2 * most_K_ + 16)};
  }

  Places places_for(int64_t rows) {
    Places places{};
    for (int64_t i = 0; i < most_kinds_; ++i)
      places[static_cast<size_t>(i)] = {room_.take<uint8_t>(rows * row_bytes_), room_.take<float>(rows),
                                        room_.take<int32_t>(rows * groups_)};
    return places;
  }

  Attention attention() const {
    const int64_t D = layer_.D;
    return {.queries = qkv_,
            .query_batch = call_.T * width_,
            .query_token = width_,
            .query_head = D,
            .new_keys = qkv_ + layer_.Q * D,
            .new_values = qkv_ + (layer_.Q + layer_.G) * D,
            .out = attended_,
            .type = call_.cache,
            .keys = call_.keys,
            .values = call_.values,
            .B = call_.B,
            .T = call_.T,
            .Q = layer_.Q,
            .G = layer_.G,
            .D = D,
            .past = call_.past,
            .cos = call_.cos,
            .sin = call_.sin,
            .R = call_.R,
            .rotary_batch = call_.rotary_batch,
            .interleaved = layer_.interleaved,
            .q_norm = layer_.q_norm,
            .k_norm = layer_.k_norm,
            .eps = layer_.head_eps,
            .mask = call_.mask,
            .mask_batch = call_.mask_batch,
            .mask_row = call_.mask_row,
            .causal = true,
            .scale = layer_.scale};
  }

  void member(const Member& me) {
    for (int64_t m = 0; m < M_; m += chunk_) {
      const int64_t rows = std::min(chunk_, M_ - m);
      stage({call_.x + m * layer_.H, layer_.input_norm, layer_.eps}, rows,
            {{}, layer_.qkv, 3, qkv_ + m * width_, width_, nullptr, false}, me);
      me.meet();
    }
    const float* attended = attend_(me);
    for (int64_t m = 0; m < M_; m += chunk_) after_attention(attended, m, std::min(chunk_, M_ - m), me);
  }

  void after_attention(const float* attended, int64_t m, int64_t rows, const Member& me) {
    const int64_t H = layer_.H, QD = layer_.Q * layer_.D;
    float* out = call_.out + m * H;
    stage({attended + m * QD, nullptr, 0}, rows, {{}, &layer_.o, 1, out, H, call_.x + m * H, false}, me);
    me.meet();
    stage({out, layer_.post_norm, layer_.post_eps}, rows, {{}, layer_.gate_up, 2, gated_, F_, nullptr, true}, me);
    me.meet();
    stage({gated_, nullptr, 0}, rows, {{}, &layer_.down, 1, out, H, out, false}, me);
    if (m + rows < M_) me.meet();
  }

  // M rows to tokens, and those by the weights of a job, whose tokens are put in here.
  void stage(const Rows& rows, int64_t M, Linear job, const Member& me) {
    ThreadRoom& mine = of_thread_[static_cast<size_t>(me.index)];
    const Place* place = (own_ ? mine.places : places_).data();
    for (size_t i = 0; i < static_cast<size_t>(job.count); ++i) {
      const size_t first = first_alike(job.weights, i);
      job.tokens[i] = job.tokens[first];
      if (first < i) continue;
      job.tokens[i] = {job.weights[i].needs, place->tiles, place->scales, place->sums, M, job.weights[i].K};
      kernels_.make_tokens(rows, job.tokens[i], mine.row, own_ ? 0 : me.begin(M), own_ ? M : me.end(M));
      ++place;
    }
    if (!own_) me.meet();
    kernels_.linear(job, me.begin(job.units()), me.end(job.units()));
  }

  const DecoderLayer& layer_;
  const DecoderCall& call_;
  const Kernels& kernels_;
  int64_t M_, width_, F_, most_K_, chunk_;
  bool own_;
  int threads_;
  Room room_;
  float *qkv_, *attended_, *gated_;
  int64_t row_bytes_ = 0, groups_ = 1, most_kinds_ = 1;  // of tokens
  Places places_;
  std::vector<ThreadRoom> of_thread_;
  AttentionTeam attend_;
};

}  // namespace

void decoder_layer(const DecoderLayer& layer, const DecoderCall& call, int threads) {
  if (call.B * call.T > 0) Run(layer, call, threads)();
}

}  // namespace fewbits
