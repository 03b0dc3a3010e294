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

// Codes [K] into row `row` of the tiles, as unsigned bytes. `codes` has room for whole steps.
void put_row(int8_t* codes, const fewbits::Tokens& tokens, int64_t row) {
  const int64_t tile = row / fewbits::kPanelRows, rows = tokens.rows_of(tile), steps = tokens.steps();
  std::memset(codes + tokens.K, 0, static_cast<size_t>(steps * 4 - tokens.K));
  uint8_t* to = tokens.tile(tile) + row % fewbits::kPanelRows * 4;
  for (int64_t s = 0; s < steps; ++s) {
    uint32_t four;
    std::memcpy(&four, codes + s * 4, 4);
    four ^= 0x80808080u;
    std::memcpy(to + s * rows * 4, &four, 4);
  }
}

// Rows [begin, end). `scratch` holds 2 · K + 16 floats.
void make_tokens(const fewbits::Rows& rows, const fewbits::Tokens& tokens, float* scratch, int64_t begin, int64_t end) {
  const int64_t K = tokens.K;
  int8_t* codes = reinterpret_cast<int8_t*>(scratch + K);
  for (int64_t m = begin; m < end; ++m) {
    const float* x = rows.x + m * K;
    if (rows.norm) {
      rms_norm(x, rows.norm, rows.eps, K, scratch);
      x = scratch;
    }
    quantize_per_token(x, K, 0, 1, codes, tokens.scales + m);
    put_row(codes, tokens, m);
  }
}

// Rows [begin, end) of x as two digits, rows 2m and 2m + 1 of the tokens: what the first leaves of x is quantized
// again.
void make_digits(const float* x, const fewbits::Tokens& tokens, float* scratch, int64_t begin, int64_t end) {
  const int64_t K = tokens.K;
  int8_t* codes = reinterpret_cast<int8_t*>(scratch + K);
  for (int64_t m = begin; m < end; ++m) {
    float* scales = tokens.scales + 2 * m;
    quantize_per_token(x + m * K, K, 0, 1, codes, scales);
    for (int64_t k = 0; k < K; ++k) scratch[k] = x[m * K + k] - static_cast<float>(codes[k]) * scales[0];
    put_row(codes, tokens, 2 * m);
    quantize_per_token(scratch, K, 0, 1, codes, scales + 1);
    put_row(codes, tokens, 2 * m + 1);
  }
}

}  // namespace
