// Rows to tokens: RMSNorm where asked for, then quantize_per_token, laid out by row tile, in one pass of the caches.
//
// The ladder
//   1  three loops over a row that stays in L1, the same source for every instruction set
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <cmath>
#include <cstring>

#include "decoder.hpp"
#include "quantize_per_token.hpp"
#include "vector.hpp"

namespace {

// out = weight · (x / sqrt(mean x² + eps)).
void rms_norm(const float* x, const float* weight, float eps, int64_t K, float* out) {
  FloatLanes squares{};
  int64_t k = 0;
  for (; k + kWidth <= K; k += kWidth) squares = fused(load(x + k), load(x + k), squares);
  float sum = sum_of(squares);
  for (; k < K; ++k) sum += x[k] * x[k];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(K) + eps);
  for (k = 0; k < K; ++k) out[k] = weight[k] * (x[k] * factor);
}

// Rows [begin, end). `scratch` holds 2 · K floats.
void make_tokens(const fewbits::Rows& rows, const fewbits::Tokens& tokens, float* scratch, int64_t begin, int64_t end) {
  const int64_t K = tokens.K, steps = tokens.steps();
  int8_t* codes = reinterpret_cast<int8_t*>(scratch + K);
  for (int64_t m = begin; m < end; ++m) {
    const float* x = rows.x + m * K;
    if (rows.norm) {
      rms_norm(x, rows.norm, rows.eps, K, scratch);
      x = scratch;
    }
    std::memset(codes + K, 0, static_cast<size_t>(steps * 4 - K));
    quantize_per_token(x, K, 0, 1, codes, tokens.scales + m);
    const int64_t tile = m / fewbits::kPanelRows, row = m % fewbits::kPanelRows, in_tile = tokens.rows_of(tile);
    uint8_t* to = tokens.tile(tile) + row * 4;
    for (int64_t s = 0; s < steps; ++s) {
      uint32_t four;
      std::memcpy(&four, codes + s * 4, 4);
      four ^= 0x80808080u;
      std::memcpy(to + s * in_tile * 4, &four, 4);
    }
  }
}

}  // namespace
