// mx_encode, nvfp4_encode: float32 -> codes and the scale that each block shares. finite_amax: the largest magnitude.
//
// The ladder
//   1  a run of blocks passes through loops over all its blocks, then all its elements: each loop is vectorized
//   2  MX: x · 2^-e is exact, so the elements go through encode_floats
//   3  NVFP4: no division of elements. A quotient passes a rounding boundary t where |x| passes t · divisor, and that
//      product is exact in a double (3 + 28 bits): seven comparisons give the code
//   4  NVFP4: multiplication by the reciprocal in float32 is off by less than two units in the last place, which
//      matters only beside a boundary. Blocks with such an element, one in 7,000 of random numbers, go through 3
//
// The meaning is fewbits/tensors/block.py. Included once per instruction set, after cast.hpp.
#pragma once

#include <algorithm>

#include "cast.hpp"
#include "kernels.hpp"

namespace {

using fewbits::MxFormat;
using fewbits::Nvfp4Format;

constexpr int64_t kRun = 2048;          // elements: a multiple of every block size
constexpr int64_t kBlocks = kRun / 16;  // most blocks in a run

float finite_amax(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = std::bit_cast<int32_t>(x[i]) & 0x7FFFFFFF;
    const int32_t finite = magnitude < kFloatInf ? magnitude : 0;
    largest = finite > largest ? finite : largest;
  }
  return std::bit_cast<float>(largest);
}

// The bits of the largest magnitude of each block; Inf and NaN come through.
template <int64_t kSize>
inline void amax_of_whole_blocks(const float* __restrict x, int64_t blocks, int32_t* __restrict amax) {
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t largest = 0;
    for (int64_t i = 0; i < kSize; ++i) {
      const int32_t magnitude = std::bit_cast<int32_t>(x[b * kSize + i]) & 0x7FFFFFFF;
      largest = magnitude > largest ? magnitude : largest;
    }
    amax[b] = largest;
  }
}

inline void amax_of_blocks(const float* x, int64_t count, int64_t size, int32_t* amax) {
  const int64_t whole = count / size;
  size == 16 ? amax_of_whole_blocks<16>(x, whole, amax) : amax_of_whole_blocks<32>(x, whole, amax);
  if (whole * size < count) {
    int32_t largest = 0;
    for (int64_t i = whole * size; i < count; ++i)
      largest = std::max(largest, std::bit_cast<int32_t>(x[i]) & 0x7FFFFFFF);
    amax[whole] = largest;
  }
}

template <int64_t kSize>
inline void scale_whole_blocks(const float* __restrict x, int64_t blocks, const float* __restrict factors,
                               float* __restrict values) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = b * kSize; i < (b + 1) * kSize; ++i) values[i] = x[i] * factors[b];
}

inline void scale_blocks(const float* x, int64_t count, int64_t size, const float* factors, float* values) {
  const int64_t whole = count / size;
  size == 16 ? scale_whole_blocks<16>(x, whole, factors, values) : scale_whole_blocks<32>(x, whole, factors, values);
  for (int64_t i = whole * size; i < count; ++i) values[i] = x[i] * factors[whole];
}

// NaN and Inf erase their block: scale NaN, codes 0.
inline void erase_blocks(const int32_t* amax, int64_t count, int64_t size, int32_t nan_scale, uint8_t* codes,
                         uint8_t* scales) {
  for (int64_t i = 0; i < count; i += size) {
    if (amax[i / size] < kFloatInf) continue;
    scales[i / size] = static_cast<uint8_t>(nan_scale);
    std::fill_n(codes + i, std::min(size, count - i), uint8_t{0});
  }
}

void mx_run(const float* x, int64_t count, const MxFormat& f, uint8_t* codes, uint8_t* scales) {
  alignas(64) float values[kRun], factors[kBlocks];
  alignas(64) int32_t amax[kBlocks];
  const int64_t blocks = fewbits::ceil_div(count, f.size);
  amax_of_blocks(x, count, f.size, amax);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t bits = std::bit_cast<int64_t>(static_cast<double>(std::bit_cast<float>(amax[b])));
    const int64_t fraction = bits & ((int64_t{1} << 52) - 1);
    int64_t exponent = static_cast<int64_t>(static_cast<uint64_t>(bits) >> 52) - 1023 - f.emax;
    exponent += fraction > f.round_up_above ? 1 : 0;
    exponent = exponent > 127 ? 127 : exponent < -127 ? -127 : exponent;
    scales[b] = static_cast<uint8_t>(exponent + 127);
    // 2^-127 is a subnormal float; all others have an exponent field
    const int32_t field = static_cast<int32_t>(127 - exponent) << kFloatMantissa;
    factors[b] = std::bit_cast<float>(field ? field : 1 << 22);
  }
  scale_blocks(x, count, f.size, factors, values);
  encode_floats(values, count, codes, f.element, 0);
  erase_blocks(amax, count, f.size, f.nan_scale, codes, scales);
}

void mx_encode(const float* x, int64_t count, const MxFormat& f, uint8_t* codes, uint8_t* scales) {
  for (int64_t first = 0; first < count; first += kRun)
    mx_run(x + first, std::min(kRun, count - first), f, codes + first, scales + first / f.size);
}

// Scale codes of blocks: amax / (6 · tensor scale) to nearest even, as encode_loop does it but from doubles.
inline void nvfp4_scales(const int32_t* __restrict amax, int64_t blocks, const Nvfp4Format& f,
                         uint8_t* __restrict scales) {
  const double whole = f.element_max * f.tensor_scale;
  const int64_t emin = f.scale.emin, mantissa_bits = f.scale.mantissa_bits, max_code = f.scale.max_code;
  double quotients[kBlocks];
  int64_t codes[kBlocks];
  for (int64_t b = 0; b < blocks; ++b) quotients[b] = static_cast<double>(std::bit_cast<float>(amax[b])) / whole;
  for (int64_t b = 0; b < blocks; ++b) {
    const uint64_t bits = std::bit_cast<uint64_t>(quotients[b]);
    const int64_t field = static_cast<int64_t>(bits >> 52);
    const uint64_t implicit = field > 0 ? uint64_t{1} << 52 : 0;
    const int64_t above = (field > 1 ? field : 1) - 1023 - emin;
    const uint64_t significand = (bits & ((uint64_t{1} << 52) - 1)) | implicit;
    const int64_t drop = 52 - mantissa_bits - (above < 0 ? above : 0);
    const uint64_t shift = static_cast<uint64_t>(drop < 54 ? drop : 54);
    const uint64_t half = (uint64_t{1} << shift) >> 1, odd = (significand >> shift) & 1;
    const int64_t kept = static_cast<int64_t>((significand + half - 1 + odd) >> shift);
    const int64_t code = ((above > 0 ? above : 0) << mantissa_bits) + kept;
    codes[b] = code > max_code ? max_code : code;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t least = amax[b] > 0 ? 1 : 0;  // a small block keeps a scale: 0 would erase it
    scales[b] = static_cast<uint8_t>(codes[b] > least ? codes[b] : least);
  }
}

// Which quotients, off by two units in the last place at most, are too near to a boundary of E2M1 to tell.
inline void near_boundaries(const float* __restrict values, int64_t count, uint8_t* __restrict near) {
  constexpr int32_t kNear = 8;
  constexpr int32_t kBoundary = (1 << 21) - 1;  // boundaries end in 21 zeros
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = std::bit_cast<int32_t>(values[i]) & 0x7FFFFFFF;
    const int32_t beside = ((magnitude + kNear) & kBoundary) <= 2 * kNear ? 1 : 0;
    near[i] = static_cast<uint8_t>(magnitude > 0x3E000000 ? beside : 0);  // 0.125: all that is smaller becomes 0
  }
}

// Codes of a block by comparisons that are exact.
inline void nvfp4_compare(const float* block, int64_t count, double divisor, const Nvfp4Format& f, uint8_t* codes) {
  double bounds[7];
  for (int b = 0; b < 7; ++b) bounds[b] = f.bounds[b] * divisor;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = std::bit_cast<int32_t>(block[i]);
    const double magnitude = std::bit_cast<float>(bits & 0x7FFFFFFF);
    int32_t above = 0;  // a tie goes to the even code: up past an odd one
    above += (magnitude > bounds[0]) + (magnitude >= bounds[1]) + (magnitude > bounds[2]) + (magnitude >= bounds[3]);
    above += (magnitude > bounds[4]) + (magnitude >= bounds[5]) + (magnitude > bounds[6]);
    codes[i] = static_cast<uint8_t>(above | (static_cast<uint32_t>(bits) >> 31 << 3));
  }
}

void nvfp4_run(const float* x, int64_t count, const Nvfp4Format& f, uint8_t* codes, uint8_t* scales) {
  constexpr double kLeast = 0x1p-100, kMost = 0x1p100;  // beyond, a reciprocal or a quotient may leave float32
  alignas(64) float values[kRun], decoded[kBlocks], inverses[kBlocks];
  alignas(64) double divisors[kBlocks];
  alignas(64) uint8_t near[kRun];
  alignas(64) int32_t amax[kBlocks];
  const int64_t blocks = fewbits::ceil_div(count, f.size);
  amax_of_blocks(x, count, f.size, amax);
  nvfp4_scales(amax, blocks, f, scales);
  decode_codes(scales, blocks, decoded, f.scale);
  for (int64_t b = 0; b < blocks; ++b) {
    const double product = static_cast<double>(decoded[b]) * f.tensor_scale;
    divisors[b] = product > 0 ? product : 1;
    inverses[b] = static_cast<float>(1 / divisors[b]);
  }
  scale_blocks(x, count, f.size, inverses, values);
  encode_floats(values, count, codes, f.element, 0);
  near_boundaries(values, count, near);
  int32_t exact = std::memchr(near, 1, static_cast<size_t>(count)) ? 1 : 0;
  for (int64_t b = 0; b < blocks; ++b) exact |= (divisors[b] < kLeast) | (divisors[b] > kMost) ? 1 : 0;
  for (int64_t b = 0; exact && b < blocks; ++b) {
    const int64_t at = b * f.size, n = std::min<int64_t>(f.size, count - at);
    const bool in_range = divisors[b] >= kLeast && divisors[b] <= kMost;
    if (!in_range || std::memchr(near + at, 1, static_cast<size_t>(n)))
      nvfp4_compare(x + at, n, divisors[b], f, codes + at);
  }
  erase_blocks(amax, count, f.size, f.scale.nan_code, codes, scales);
}

void nvfp4_encode(const float* x, int64_t count, const Nvfp4Format& f, uint8_t* codes, uint8_t* scales) {
  for (int64_t first = 0; first < count; first += kRun)
    nvfp4_run(x + first, std::min(kRun, count - first), f, codes + first, scales + first / f.size);
}

}  // namespace
