// Weights of 4 or 8 bits with a scale per group, in panels, and the jobs that multiply by them.
//
// Letters: M tokens (rows), K input features, N output channels, G groups of features, each with a scale.
#pragma once

#include <cstdint>

namespace fewbits {

// A panel holds 32 output channels; the last one is padded with zeros.
//
//   panel: | word 0 of channel 0 | word 0 of channel 1 | … | word 0 of channel 31 | word 1 of channel 0 | …
//          |<----- 4 bytes ----->|
//
// A word is what the codes are in a row of the weight: 4 codes of 8 bits, or 8 codes of 4 bits, the first in the low
// half of a byte. A decode step reads the panels as one stream; a vector of words holds as many channels as it has
// lanes.
constexpr int64_t kPanelChannels = 32;
constexpr int64_t kWordBytes = 4;
constexpr int64_t kPanelStep = kPanelChannels * kWordBytes;  // bytes of a panel for one word of each channel
constexpr int64_t kPanelRows = 12;                           // rows of a tile of activations

struct PanelWeight {
  const uint8_t* packed;  // panels
  const void* scales;     // [panels][G][32] float32 or bfloat16
  bool bf16_scales;
  int64_t N, G;
  int64_t words;  // of a group: a word holds features of one group
  int64_t code_bits = 4;

  int64_t panels() const { return (N + kPanelChannels - 1) / kPanelChannels; }
  int64_t features_of_word() const { return kWordBytes * 8 / code_bits; }
  int64_t features_of_group() const { return words * features_of_word(); }
  int64_t features() const { return G * features_of_group(); }  // K, or more where the last word is padded
  const uint8_t* panel(int64_t index) const { return packed + index * G * words * kPanelStep; }
  const void* scales_of(int64_t panel) const {
    const int64_t bytes = panel * G * kPanelChannels * (bf16_scales ? 2 : 4);
    return static_cast<const char*>(scales) + bytes;
  }
};

// Tiles of rows: what int4_matmul and weight_only_matmul have in common.
struct RowTiles {
  int64_t M;

  int64_t count() const { return (M + kPanelRows - 1) / kPanelRows; }
  int64_t rows_of(int64_t tile) const { return tile + 1 < count() ? kPanelRows : M - tile * kPanelRows; }
};

struct Int4Matmul {
  PanelWeight weight;         // 4 bits, two's complement
  const int8_t* codes;        // [M, K]
  const float* token_scales;  // [M]
  const float* bias;          // [N] or null
  float* out;                 // [M, N]
  RowTiles rows;
  int8_t* tiles;  // scratch [M, K], and
  int32_t* sums;  // scratch [M, G]: both by row tile, see int4_pack_rows

  int8_t* tile(int64_t index) const { return tiles + index * kPanelRows * weight.features(); }
  int32_t* tile_sums(int64_t index) const { return sums + index * kPanelRows * weight.G; }
};

// How the codes of a weight become numbers, before they are scaled.
enum class Codes : int32_t { kTable, kInt8, kE4m3 };

struct WeightOnlyMatmul {
  PanelWeight weight;
  Codes how;
  const float* table;  // 16 values, for codes of 4 bits
  bool e4m3_tokens;    // round each row to e4m3fn with a scale of its own first
  const float* x;      // [M, K]
  const float* bias;   // [N] or null
  float* out;          // [M, N]
  int64_t K;
  RowTiles rows;
  float* tiles;         // scratch [M, weight.features()], by row tile
  float* rounded;       // scratch [M, K], and
  float* token_scales;  // scratch [M]: with e4m3_tokens

  float* tile(int64_t index) const { return tiles + index * kPanelRows * weight.features(); }
};

}  // namespace fewbits
