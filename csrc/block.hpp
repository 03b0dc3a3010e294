// mx_encode, nvfp4_encode: float32 -> codes and the scale that each block shares. finite_amax: the largest magnitude.
//
// The ladder
//   1  per block, the scale in scalar code on doubles, as the meaning has it (fewbits/tensors/block.py): one in 16 or
//   32 2  MX: x · 2^-e is exact, so the elements go through encode_floats, vectorized, a chunk at a time 3  NVFP4: no
//   division. A quotient passes a rounding boundary t where |x| passes t · divisor, and that product is
//      exact in a double (3 + 28 bits): seven comparisons give the code
//
// Included once per instruction set, after cast.hpp.
#pragma once

#include <algorithm>

#include "cast.hpp"

namespace {

using fewbits::MxFormat;
using fewbits::Nvfp4Format;

constexpr int64_t kRun = 2048;  // elements: a multiple of every block size

inline int32_t amax_bits(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = std::bit_cast<int32_t>(x[i]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

float finite_amax(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = std::bit_cast<int32_t>(x[i]) & 0x7FFFFFFF;
    const int32_t finite = magnitude < kFloatInf ? magnitude : 0;
    largest = finite > largest ? finite : largest;
  }
  return std::bit_cast<float>(largest);
}

// The exponent of the scale of a block, -127 … 127.
inline int32_t mx_exponent(float amax, const MxFormat& f) {
  const int64_t bits = std::bit_cast<int64_t>(static_cast<double>(amax));
  const int64_t exponent = (bits >> 52) - 1023, fraction = bits & ((int64_t{1} << 52) - 1);
  const int64_t wanted = exponent + (fraction > f.round_up_above) - f.emax;
  return static_cast<int32_t>(std::clamp<int64_t>(wanted, -127, 127));
}

void mx_encode(const float* x, int64_t count, const MxFormat& f, uint8_t* codes, uint8_t* scales) {
  alignas(64) float values[kRun];
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t run = std::min(kRun, count - first);
    for (int64_t at = 0; at < run; at += f.size) {
      const float* block = x + first + at;
      const int64_t n = std::min<int64_t>(f.size, run - at);
      const int32_t largest = amax_bits(block, n);
      uint8_t* scale = scales + (first + at) / f.size;
      if (largest >= kFloatInf) {
        *scale = static_cast<uint8_t>(f.nan_scale);
        std::fill_n(values + at, n, 0.0f);
        continue;
      }
      const int32_t exponent = mx_exponent(std::bit_cast<float>(largest), f);
      *scale = static_cast<uint8_t>(exponent + 127);
      // 2^-127 is a subnormal float; all others have an exponent field
      const float factor = std::bit_cast<float>(exponent < 127 ? (127 - exponent) << kFloatMantissa : 1 << 22);
      for (int64_t i = 0; i < n; ++i) values[at + i] = block[i] * factor;
    }
    encode_floats(values, run, codes + first, f.element, 0);
  }
}

// Round to nearest even to a code of a small format; for scales, which are few. Positive and finite only.
inline int32_t nearest_code(double value, const Codec& f) {
  const int64_t bits = std::bit_cast<int64_t>(value);
  const int64_t field = bits >> 52;
  const int64_t above = std::max<int64_t>(field, 1) - 1023 - f.emin;
  const int64_t significand = (bits & ((int64_t{1} << 52) - 1)) | (field > 0 ? int64_t{1} << 52 : 0);
  const int64_t shift = std::min<int64_t>(52 - f.mantissa_bits - std::min<int64_t>(above, 0), 54);
  const int64_t half = int64_t{1} << (shift - 1), odd = (significand >> shift) & 1;
  const int64_t code = (std::max<int64_t>(above, 0) << f.mantissa_bits) + ((significand + half - 1 + odd) >> shift);
  return static_cast<int32_t>(std::min<int64_t>(code, f.max_code));
}

void nvfp4_encode(const float* x, int64_t count, const Nvfp4Format& f, uint8_t* codes, uint8_t* scales) {
  for (int64_t first = 0; first < count; first += f.size) {
    const float* block = x + first;
    const int64_t n = std::min<int64_t>(f.size, count - first);
    const int32_t largest = amax_bits(block, n);
    if (largest >= kFloatInf) {
      scales[first / f.size] = static_cast<uint8_t>(f.scale.nan_code);
      std::fill_n(codes + first, n, uint8_t{0});
      continue;
    }
    const double amax = std::bit_cast<float>(largest);
    int32_t scale = nearest_code(amax / (f.element_max * f.tensor_scale), f.scale);
    scale = largest > 0 ? std::max(scale, 1) : scale;  // a small block keeps a scale: 0 would erase it
    scales[first / f.size] = static_cast<uint8_t>(scale);
    float decoded;
    const uint8_t code = static_cast<uint8_t>(scale);
    decode_codes(&code, 1, &decoded, f.scale);
    const double product = static_cast<double>(decoded) * f.tensor_scale;
    const double divisor = product > 0 ? product : 1;
    double bounds[7];
    for (int b = 0; b < 7; ++b) bounds[b] = f.bounds[b] * divisor;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t bits = std::bit_cast<int32_t>(block[i]);
      const double magnitude = std::bit_cast<float>(bits & 0x7FFFFFFF);
      int64_t above = 0;  // a tie goes to the even code: up past an odd one
      above += (magnitude > bounds[0]) + (magnitude >= bounds[1]) + (magnitude > bounds[2]) + (magnitude >= bounds[3]);
      above += (magnitude > bounds[4]) + (magnitude >= bounds[5]) + (magnitude > bounds[6]);
      codes[first + i] = static_cast<uint8_t>(above | (static_cast<uint32_t>(bits) >> 31 << 3));
    }
  }
}

}  // namespace
