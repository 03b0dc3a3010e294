// What one decoder layer is made of: its weights, its tokens, its attention. Data for the kernels; no code of theirs.
//
// Letters: B texts, T new tokens of each, M = B · T rows, H hidden features, Q query heads, G key and value heads,
// D channels of a head, S = past + T positions.
#pragma once

#include <cstdint>

#include "panel_weight.hpp"

namespace fewbits {

enum class WeightKind : int32_t { kInt8 };

// A packed weight [N, K]: panels of kPanelChannels channels, of whatever kind.
struct Weight {
  WeightKind kind;
  const int8_t* packed;
  const float* scales;  // [N], or as its kind says
  const float* bias;    // [N] or null
  int64_t N, K, group;

  int64_t panels() const { return (N + kPanelChannels - 1) / kPanelChannels; }
};

// Quantized activations [M, K], as int8_pack_rows lays them out: row tiles [steps][rows][4] of code + 128.
struct Tokens {
  uint8_t* tiles;
  float* scales;  // [M]
  int64_t M, K;

  int64_t steps() const { return (K + 3) / 4; }
  int64_t row_tiles() const { return (M + kPanelRows - 1) / kPanelRows; }
  int64_t rows_of(int64_t tile) const { return tile + 1 < row_tiles() ? kPanelRows : M - tile * kPanelRows; }
  uint8_t* tile(int64_t index) const { return tiles + index * kPanelRows * steps() * 4; }
};

// Float rows [M, K] to become tokens, normalized first if there is a norm: weight · x / sqrt(mean x² + eps).
struct Rows {
  const float* x;     // [M, K]
  const float* norm;  // [K] or null
  float eps;
};

// Weights with the same input; their outputs lie side by side in a row of `out`.
struct Linear {
  Tokens tokens;
  const Weight* weights;
  int64_t count;
  float* out;  // [M, stride]
  int64_t stride;
  const float* residual;  // [M, stride] or null: added
  bool gated;             // two weights: out = silu(first) · second

  int64_t panels() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < (gated ? 1 : count); ++i) sum += weights[i].panels();
    return sum;
  }
  int64_t units() const { return panels() * tokens.row_tiles(); }
};

struct Attention {
  const float* qkv;  // [M, stride]: query heads, key heads, value heads, as the projections give them
  int64_t stride;
  float* out;            // [M, Q · D]
  float *keys, *values;  // [B, G, ≥ S, D], positions adjacent; those of new tokens are written here
  int64_t key_batch, key_head, value_batch, value_head;  // strides in floats
  int64_t B, T, Q, G, D, past;
  const float *cos, *sin;  // [1 or B, T, R]
  int64_t R, rotary_batch;
  bool interleaved;              // which channels turn together: 2i and 2i + 1, or i and i + R / 2
  const float *q_norm, *k_norm;  // [D] or null
  float eps;
  const uint8_t* mask;  // [B, T, S] of 0 and 1, or null: a token sees all up to itself
  int64_t mask_batch, mask_row;
  float scale;

  int64_t S() const { return past + T; }
  int64_t rows() const { return T * (Q / G); }  // queries that share a key head; row r is token r / (Q / G)
  int64_t limit(int64_t t) const { return mask ? S() : past + t + 1; }  // positions that token t may see
  const uint8_t* mask_of(int64_t b, int64_t t) const { return mask + b * mask_batch + t * mask_row; }
};

// Result of some positions, to be merged with others': Σ e^(score − largest) · value, and what it takes to rescale it.
struct Partial {
  float* sums;  // [rows, D]
  float* largest;
  float* total;
};

}  // namespace fewbits
