// What one attention is made of. Data for the kernels; no code of theirs.
//
// Letters: B texts, T new tokens of each, M = B · T rows, Q query heads, G key and value heads, D channels of a head,
// S = past + T positions, R rotated channels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fewbits {

// How keys and values are kept. int8 codes have a scale for each head and token: x ≈ code · scale.
enum class CacheType : int32_t { kFloat32, kBFloat16, kInt8 };

// Keys or values [B, G, ≥ S, D]; the channels of a token lie together.
struct CacheTensor {
  void* data;
  float* scales;               // of int8 codes, whose tokens are adjacent: laid out as they are, one for D codes
  int64_t batch, head, token;  // strides in elements
};

struct Attention {
  // Head h of token t of text b is at queries + b · query_batch + t · query_token + h · query_head.
  const float* queries;
  int64_t query_batch, query_token, query_head;
  const float *new_keys, *new_values;  // strided as the queries, to be written into the cache; null: they are in it
  float* out;                          // [M, Q · D]
  CacheType type;
  CacheTensor keys, values;
  int64_t B, T, Q, G, D, past;
  const float *cos, *sin;  // [1 or B, T, R], R even
  int64_t R, rotary_batch;
  bool interleaved;              // which channels turn together: 2i and 2i + 1, or i and i + R / 2
  const float *q_norm, *k_norm;  // [D] or null
  float eps;
  const uint8_t* mask;  // [B, T, S] of 0 and 1, or null: a token sees all, or with `causal` all up to itself
  int64_t mask_batch, mask_row;
  bool causal;
  float scale;

  int64_t S() const { return past + T; }
  int64_t repeats() const { return Q / G; }       // queries of a token that share a key head
  int64_t rows() const { return T * repeats(); }  // of a key head; row r is token r / repeats
  // How many positions token t may see, but for the mask.
  int64_t limit(int64_t t) const { return mask || !causal ? S() : past + t + 1; }
  const uint8_t* mask_of(int64_t b, int64_t t) const { return mask + b * mask_batch + t * mask_row; }
};

// Result of some positions, to be merged with others': Σ e^(score − largest) · value, and what it takes to rescale it.
struct Partial {
  float* sums;  // [rows, D]
  float* largest;
  float* total;
};

}  // namespace fewbits
