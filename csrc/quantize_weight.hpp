// quantize_weight: w [N, K] float32 or bfloat16 -> codes int8 [N, K] (or two of 4 bits a byte), scales [N, K / group].
//
// The ladder
//   1  one plain loop for every instruction set, group by group: the largest magnitude, the scale, the codes. The
//      weights of a row are read from memory once; the second look finds them in the cache. A rotated row is made
//      beside it first.
//
// Included once per instruction set, hence the anonymous namespace: no copy may leak into another set's code.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>

#include "kernels.hpp"
#include "rotation.hpp"

namespace {

inline float weight_at(const float* w, int64_t k) { return w[k]; }
inline float weight_at(const uint16_t* w, int64_t k) {
  return std::bit_cast<float>(static_cast<uint32_t>(w[k]) << 16);  // bfloat16 is the upper half of a float32
}

// The scale max|w| / divisor, at least 2^-126, rounded up to bfloat16 if that is what is stored.
inline float weight_scale(uint32_t largest, float divisor, bool bf16) {
  constexpr uint32_t kTiny = 0x00800000;
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(largest) / divisor);
  bits = bits < kTiny ? kTiny : bits;
  return std::bit_cast<float>(bf16 ? (bits + 0xFFFF) & 0xFFFF0000 : bits);
}

template <typename T>
void quantize_group(const T* __restrict w, int64_t size, const fewbits::WeightJob& job, int8_t* __restrict codes,
                    float* __restrict scale, uint32_t* __restrict bad) {
  constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23: its ulp is 1, so adding it rounds to an integer in the low bits
  uint32_t largest = 0;
  for (int64_t k = 0; k < size; ++k) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(weight_at(w, k)) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float step = weight_scale(largest, job.divisor, job.bf16_scales);
  *scale = step;
  *bad |= (largest >= 0x7F800000) | (std::bit_cast<uint32_t>(step) >= 0x7F800000);
  for (int64_t k = 0; k < size; ++k) {
    const int32_t code = static_cast<int32_t>(std::bit_cast<uint32_t>(weight_at(w, k) / step + kMagic)) - 0x4B400000;
    const int32_t above = code < job.low ? job.low : code;
    codes[k] = static_cast<int8_t>(above > job.high ? job.high : above);
  }
}

template <typename T>
void quantize_weight_row(const T* w, int64_t row, const fewbits::WeightJob& job, uint32_t* bad) {
  constexpr int64_t kPiece = 1024;  // codes of 4 bits wait here for their pair
  alignas(64) int8_t piece[kPiece];
  const int64_t groups = job.K / job.group;
  for (int64_t g = 0; g < groups; ++g, w += job.group) {
    float* scale = job.scales + row * groups + g;
    if (!job.nibbles) {
      quantize_group(w, job.group, job, job.codes + row * job.K + g * job.group, scale, bad);
      continue;
    }
    quantize_group(w, job.group, job, piece, scale, bad);  // group <= kPiece
    int8_t* out = job.codes + (row * job.K + g * job.group) / 2;
    for (int64_t k = 0; k < job.group / 2; ++k) {
      out[k] = static_cast<int8_t>((piece[2 * k] & 15) | ((piece[2 * k + 1] & 15) << 4));
    }
  }
}

template <typename T>
void quantize_weight_rows(const fewbits::WeightJob& job, int64_t begin, int64_t end, uint32_t* bad) {
  const std::unique_ptr<float[]> rotated(job.rotation ? new float[static_cast<size_t>(job.K)] : nullptr);
  for (int64_t row = begin; row < end; ++row) {
    const T* w = static_cast<const T*>(job.weight) + row * job.K;
    if (!job.rotation) {
      quantize_weight_row(w, row, job, bad);
      continue;
    }
    for (int64_t k = 0; k < job.K; ++k) rotated[k] = weight_at(w, k);
    rotate(rotated.get(), job.K, job.rotation, rotated.get());
    quantize_weight_row<float>(rotated.get(), row, job, bad);
  }
}

// Rows [begin, end). Tells whether a weight was not finite or a scale is beyond its format; codes mean nothing then.
bool quantize_weight(const fewbits::WeightJob& job, int64_t begin, int64_t end) {
  uint32_t bad = 0;
  if (job.bf16_weight) {
    quantize_weight_rows<uint16_t>(job, begin, end, &bad);
  } else {
    quantize_weight_rows<float>(job, begin, end, &bad);
  }
  return bad != 0;
}

}  // namespace
