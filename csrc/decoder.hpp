// What one decoder layer is made of, beside its attention (attention_job.hpp): its weights, its tokens. Data for the
// kernels; no code of theirs.
//
// Letters: B texts, T new tokens of each, M = B · T rows, H hidden features, Q query heads, G key and value heads,
// D channels of a head, S = past + T positions.
#pragma once

#include <cstdint>

#include "attention_job.hpp"
#include "panel_weight.hpp"

namespace fewbits {

// What a weight multiplies: int8 codes with a scale per row, in the order of int8_matmul or of int4_matmul; or floats,
// as they are or rounded to e4m3fn with a scale per row.
enum class TokenKind : int32_t { kInt8, kInt4, kFloat, kE4m3 };

// All that tokens depend on beside the rows that they are made of: weights that need the same share them.
struct TokenNeeds {
  TokenKind kind;
  int64_t groups;    // of features, whose codes are summed, if the kind is kInt4; else 1
  int64_t rotation;  // features of a block that the rows are rotated by (rotation.hpp), or 0

  bool operator==(const TokenNeeds&) const = default;
};

// A packed weight [N, K] of whatever kind.
struct Weight {
  TokenNeeds needs;
  PanelWeight panels;  // kInt8 has panels of its own (kernels.hpp), and scales [N] float32
  Codes how;           // kFloat, kE4m3: how codes become numbers
  const float* table;  // 16 values, for codes of 4 bits
  const float* bias;   // [N] or null
  int64_t K;
};

// Activations [M, K] in row tiles of kPanelRows.
//
//   kInt8          [steps][rows][4] unsigned bytes, code + 128
//   kInt4          [steps][rows][8] codes, features 0 2 4 6 1 3 5 7 of a step
//   kFloat, kE4m3  [features][rows] floats
struct Tokens {
  TokenNeeds needs;
  uint8_t* tiles;
  float* scales;  // [M]
  int32_t* sums;  // kInt4: by row tile [groups][rows], −8 · Σ code of the group
  int64_t M, K;

  bool floats() const { return needs.kind == TokenKind::kFloat || needs.kind == TokenKind::kE4m3; }
  int64_t features() const { return (K + 3) / 4 * 4; }  // those beyond K are zeros
  int64_t row_bytes() const { return features() * (floats() ? 4 : 1); }
  int64_t row_tiles() const { return (M + kPanelRows - 1) / kPanelRows; }
  int64_t rows_of(int64_t tile) const { return tile + 1 < row_tiles() ? kPanelRows : M - tile * kPanelRows; }
  uint8_t* tile(int64_t index) const { return tiles + index * kPanelRows * row_bytes(); }
  int32_t* tile_sums(int64_t index) const { return sums + index * kPanelRows * needs.groups; }
};

// Float rows [M, K] to become tokens, normalized first if there is a norm: weight · x / sqrt(mean x² + eps); then
// rotated, if the tokens need it.
struct Rows {
  const float* x;     // [M, K]
  const float* norm;  // [K] or null
  float eps;
};

// Weights with the same input, made into the tokens that each of them needs; their outputs lie side by side in a row of
// `out`.
struct Linear {
  Tokens tokens[3];
  const Weight* weights;
  int64_t count;  // at most 3
  float* out;     // [M, stride]
  int64_t stride;
  const float* residual;  // [M, stride] or null: added
  bool gated;             // two weights: out = silu(first) · second

  int64_t panels() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < (gated ? 1 : count); ++i) sum += weights[i].panels.count();
    return sum;
  }
  int64_t units() const { return panels() * tokens[0].row_tiles(); }
};

}  // namespace fewbits
