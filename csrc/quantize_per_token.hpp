// quantize_per_token: x [M, K] float32 -> codes [M, K] int8, scales [M] float32, so that x ≈ codes · scale.
//
// The ladder
//   1  one plain loop for every instruction set; the compiler vectorizes it. Two tricks make that possible without
//      fast-math: |x| is compared as an integer (same order, NaN above Inf), and rounding is one addition.
//
// Included once per instruction set, hence the anonymous namespace: no copy may leak into another set's code.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace {

// scale = max(max|x| / 127, 2^-126), code = round_to_nearest_even(x · (1 / scale)): a row of zeros gets zeros and a
// finite scale. A row with NaN or Inf gets zeros and the scale NaN, so that its results are NaN and no other row's.
void quantize_per_token(const float* x, int64_t K, int64_t begin, int64_t end, int8_t* codes, float* scales) {
  constexpr uint32_t kInf = 0x7F800000;
  constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23: its ulp is 1, so adding it rounds to an integer in the low bits
  for (int64_t row = begin; row < end; ++row) {
    const float* in = x + row * K;
    int8_t* out = codes + row * K;
    uint32_t largest = 0;
    for (int64_t k = 0; k < K; ++k) {
      const uint32_t magnitude = std::bit_cast<uint32_t>(in[k]) & 0x7FFFFFFF;
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= kInf) {
      for (int64_t k = 0; k < K; ++k) out[k] = 0;
      scales[row] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    const float scale = std::bit_cast<float>(largest) / 127.0f;
    scales[row] = scale > std::numeric_limits<float>::min() ? scale : std::numeric_limits<float>::min();
    const float inverse = 1.0f / scales[row];
    for (int64_t k = 0; k < K; ++k) {
      out[k] = static_cast<int8_t>(std::bit_cast<uint32_t>(in[k] * inverse + kMagic));
    }
  }
}

}  // namespace
