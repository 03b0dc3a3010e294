// What the matmuls on weights in panels have in common: blocks of sums, and their totals over the groups of features.
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <utility>

#include "decoder.hpp"
#include "lanes.hpp"

namespace {

using fewbits::kPanelChannels;
using fewbits::kPanelRows;
using fewbits::kPanelStep;
using fewbits::PanelWeight;

// Some rows of a row tile by kBlockVectors vectors of channels of a panel.
struct PanelBlock {
  const PanelWeight& weight;
  const uint8_t* words;   // of the first channel of the block
  const char* scales;     // of the panel
  const uint8_t* tile;    // of the first row of the block
  const int32_t* sums;    // kInt4: likewise
  const float* table;     // kFloat, kE4m3
  int64_t stride, first;  // rows of the tile; first channel
  float* totals;          // [rows][kPanelChannels]

  int64_t scale_bytes() const { return kPanelChannels * (weight.bf16_scales ? 2 : 4); }  // of a group
  // With few rows the panel comes from memory, at the pace of the prefetcher.
  template <int Rows>
  static void read_ahead(const uint8_t* at) {
    constexpr int64_t kAhead = 2048;  // bytes
    if constexpr (Rows <= kRowsFromMemory) prefetch(at + kAhead);
  }
};

// The totals of a block: in registers where it leaves some free, else in memory.
template <int Rows>
class Totals {
 public:
  explicit Totals(const PanelBlock& block) : memory_(block.totals + block.first) {
    each([&](int r, int v) { put(r, v, same_float(0)); });
  }
  Floats get(int r, int v) const {
    if constexpr (kHeld) return held_[r][v];
    return load_floats(memory_ + r * kPanelChannels + v * kVectorWords);
  }
  void put(int r, int v, Floats value) {
    if constexpr (kHeld)
      held_[r][v] = value;
    else
      store_floats(memory_ + r * kPanelChannels + v * kVectorWords, value);
  }
  void finish() const {
    if constexpr (kHeld)
      each([&](int r, int v) { store_floats(memory_ + r * kPanelChannels + v * kVectorWords, held_[r][v]); });
  }

 private:
  static constexpr bool kHeld = Rows <= kRowsFromMemory;
  template <class Each>
  static void each(const Each& of) {
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < kBlockVectors; ++v) of(r, v);
  }
  float* memory_;
  Floats held_[kHeld ? Rows : 1][kBlockVectors];
};

// The row tile `index` of tokens by a panel: totals [rows][kPanelChannels], not yet times the scales of the rows.
// `Run::run<Rows>(block)` makes a block of up to kBlockRows rows.
template <class Run>
void panel_tile(const fewbits::Weight& weight, const fewbits::Tokens& tokens, int64_t panel, int64_t index,
                float* totals) {
  const int64_t rows = tokens.rows_of(index), row_bytes = tokens.floats() ? 4 : 8;
  const PanelWeight& panels = weight.panels;
  for (int64_t first = 0; first < kPanelChannels; first += kVectorWords * kBlockVectors)
    for (int64_t r = 0; r < rows; r += kBlockRows) {
      const PanelBlock block{panels,
                             panels.panel(panel) + first * fewbits::kWordBytes,
                             static_cast<const char*>(panels.scales_of(panel)),
                             tokens.tile(index) + r * row_bytes,
                             tokens.sums ? tokens.tile_sums(index) + r : nullptr,
                             weight.table,
                             rows,
                             first,
                             totals + r * kPanelChannels};
      [&]<int... I>(std::integer_sequence<int, I...>) {
        ((rows - r == I + 1 || (I + 1 == kBlockRows && rows - r > kBlockRows) ? Run::template run<I + 1>(block)
                                                                              : void()),
         ...);
      }(std::make_integer_sequence<int, kBlockRows>());
    }
}

}  // namespace
