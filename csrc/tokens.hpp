// Rows to tokens: RMSNorm and rotation where asked for, then codes or floats as the weights need them, laid out by row
// tile, in one pass of the caches.
//
// The ladder
//   1  a few loops over a row that stays in L1, the same source for every instruction set
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <cstring>

#include "decoder.hpp"
#include "int4_matmul.hpp"
#include "quantize_per_token.hpp"
#include "rms_norm.hpp"
#include "rotation.hpp"
#include "weight_only_matmul.hpp"

namespace {

// Codes [K] into row `row` of the tiles, as unsigned bytes. `codes` has room for whole steps.
void put_int8_row(int8_t* codes, const fewbits::Tokens& tokens, int64_t row) {
  const int64_t tile = row / fewbits::kPanelRows, rows = tokens.rows_of(tile), padded = tokens.features();
  std::memset(codes + tokens.K, 0, static_cast<size_t>(padded - tokens.K));
  uint8_t* to = tokens.tile(tile) + row % fewbits::kPanelRows * 4;
  for (int64_t k = 0; k < padded; k += 4) {
    uint32_t four;
    std::memcpy(&four, codes + k, 4);
    four ^= 0x80808080u;
    std::memcpy(to + k * rows, &four, 4);
  }
}

// One row x [K]. `scratch` holds K + 16 floats.
void make_token(const float* x, const fewbits::Tokens& tokens, int64_t row, float* scratch) {
  const int64_t K = tokens.K;
  int8_t* codes = reinterpret_cast<int8_t*>(scratch);
  switch (tokens.needs.kind) {
    case fewbits::TokenKind::kInt8:
      quantize_per_token(x, K, 0, 1, codes, tokens.scales + row);
      return put_int8_row(codes, tokens, row);
    case fewbits::TokenKind::kInt4:
      quantize_per_token(x, K, 0, 1, codes, tokens.scales + row);
      return put_int4_row(codes, tokens, row);
    case fewbits::TokenKind::kFloat:
      tokens.scales[row] = 1;
      return put_float_row(x, tokens, row);
    case fewbits::TokenKind::kE4m3:
      tokens.scales[row] = e4m3_row(x, K, scratch);
      return put_float_row(scratch, tokens, row);
  }
}

// Rows [begin, end). `scratch` holds 2 · K + 16 floats.
void make_tokens(const fewbits::Rows& rows, const fewbits::Tokens& tokens, float* scratch, int64_t begin, int64_t end) {
  const int64_t K = tokens.K;
  for (int64_t m = begin; m < end; ++m) {
    const float* x = rows.x + m * K;
    if (rows.norm) {
      rms_norm(x, rows.norm, rows.eps, K, scratch);
      x = scratch;
    }
    if (tokens.needs.rotation) {
      rotate(x, K, tokens.needs.rotation, scratch);
      x = scratch;
    }
    make_token(x, tokens, m, scratch + K);
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
    put_int8_row(codes, tokens, 2 * m);
    quantize_per_token(scratch, K, 0, 1, codes, scales + 1);
    put_int8_row(codes, tokens, 2 * m + 1);
  }
}

}  // namespace
