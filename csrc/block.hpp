// mx_encode, nvfp4_encode: float32 -> codes and the scale that each block shares. finite_amax: the largest magnitude.
//
// The ladder
//   1  a run of blocks passes through loops over all its blocks, then all its elements: each loop is vectorized
//   2  MX: x · 2^-e is exact, so the elements go through encode_floats
//   3  NVFP4: no division of elements. A quotient passes a rounding boundary t where |x| passes t · divisor, and that
//      product is exact in a double (3 + 28 bits). A divisor is one of 127 scales, times that of the tensor: a table
//      has the first float32 past each boundary, for each of them, and seven comparisons of integers give the code
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
  int32_t largest = 0;
  for (int64_t b = 0; b * size < count; ++b) largest = amax[b] > largest ? amax[b] : largest;
  for (int64_t b = 0; largest >= kFloatInf && b * size < count; ++b) {
    if (amax[b] < kFloatInf) continue;
    scales[b] = static_cast<uint8_t>(nan_scale);
    std::fill_n(codes + b * size, std::min(size, count - b * size), uint8_t{0});
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

// Scale codes of blocks: amax / (6 · tensor scale) to nearest even, as encode_plain_nearest does it but from doubles.
inline void nvfp4_scales(const int32_t* __restrict amax, int64_t blocks, const Nvfp4Format& f,
                         uint8_t* __restrict scales) {
  const double whole = f.element_max * f.tensor_scale;
  const int32_t mantissa_bits = f.scale.mantissa_bits, emin = f.scale.emin, drop = 52 - mantissa_bits;
  const int64_t half = int64_t{1} << (drop - 1), max_code = f.scale.max_code;
  const int64_t rebias = static_cast<int64_t>(emin + 1022) << mantissa_bits;
  const double smallest_normal = std::bit_cast<double>(static_cast<int64_t>(emin + 1023) << 52);
  const double anchor = std::bit_cast<double>(static_cast<int64_t>(emin - mantissa_bits + 52 + 1023) << 52);
  alignas(64) double quotients[kBlocks];
  for (int64_t b = 0; b < blocks; ++b) quotients[b] = static_cast<double>(std::bit_cast<float>(amax[b])) / whole;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t bits = std::bit_cast<int64_t>(quotients[b]);
    const int64_t odd = static_cast<int64_t>(static_cast<uint64_t>(bits) >> drop) & 1;
    const int64_t normal = static_cast<int64_t>(static_cast<uint64_t>(bits + half - 1 + odd) >> drop) - rebias;
    const int64_t small = std::bit_cast<int64_t>(quotients[b] + anchor) - std::bit_cast<int64_t>(anchor);
    int64_t code = quotients[b] < smallest_normal ? small : normal;
    code = code < max_code ? code : max_code;
    const int64_t least = amax[b] > 0 ? 1 : 0;  // a small block keeps a scale: 0 would erase it
    scales[b] = static_cast<uint8_t>(code > least ? code : least);
  }
}

// Codes of blocks: as many boundaries as the magnitude passes, and the sign.
#if defined(__AVX512VNNI__)
inline void count_boundaries(const float* x, int64_t blocks, const Nvfp4Format& f, const uint8_t* scales,
                             int32_t* codes) {
  for (int64_t b = 0; b < blocks; ++b) {  // by bisection: the middle boundary, then one of two, then one of four
    const int32_t* first = f.boundaries[scales[b]];
    const __m512i all = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i bits = _mm512_loadu_si512(x + b * 16);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    __m512i code = _mm512_and_si512(_mm512_srli_epi32(bits, 28), _mm512_set1_epi32(8));
    const __mmask16 upper = _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(first[3]));
    code = _mm512_mask_add_epi32(code, upper, code, _mm512_set1_epi32(4));
    const __m512i second = _mm512_mask_set1_epi32(_mm512_set1_epi32(first[1]), upper, first[5]);
    const __mmask16 beyond = _mm512_cmpge_epi32_mask(magnitude, second);
    code = _mm512_mask_add_epi32(code, beyond, code, _mm512_set1_epi32(2));
    const __m512i third = _mm512_permutexvar_epi32(code, all);  // the sign bit selects the other copy
    const __mmask16 last = _mm512_cmpge_epi32_mask(magnitude, third);
    _mm512_storeu_si512(codes + b * 16, _mm512_mask_add_epi32(code, last, code, _mm512_set1_epi32(1)));
  }
}
#else
// GCC finds no vectors in a loop of seven comparisons.
#if defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef int32_t Lanes __attribute__((vector_size(kLanes * 4)));

inline void count_boundaries(const float* x, int64_t blocks, const Nvfp4Format& f, const uint8_t* scales,
                             int32_t* codes) {
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t* first = f.boundaries[scales[b]];
    for (int64_t i = b * 16; i < b * 16 + 16; i += kLanes) {
      Lanes bits;
      std::memcpy(&bits, x + i, sizeof bits);
      const Lanes magnitude = bits & 0x7FFFFFFF;
      Lanes code = (bits >> 28) & 8;
      for (int k = 0; k < 7; ++k) code -= magnitude >= first[k];  // true is -1
      std::memcpy(codes + i, &code, sizeof code);
    }
  }
}
#endif

void nvfp4_run(const float* x, int64_t count, const Nvfp4Format& f, uint8_t* codes, uint8_t* scales) {
  alignas(64) int32_t amax[kBlocks], wide[kRun];
  const int64_t whole = count / 16;
  amax_of_blocks(x, count, f.size, amax);
  nvfp4_scales(amax, fewbits::ceil_div(count, f.size), f, scales);
  count_boundaries(x, whole, f, scales, wide);
  if (const auto rest = static_cast<size_t>(count - whole * 16)) {
    float last[16] = {};
    std::memcpy(last, x + whole * 16, rest * sizeof(float));
    count_boundaries(last, 1, f, scales + whole, wide + whole * 16);
  }
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
  erase_blocks(amax, count, f.size, f.scale.nan_code, codes, scales);
}

void nvfp4_encode(const float* x, int64_t count, const Nvfp4Format& f, uint8_t* codes, uint8_t* scales) {
  for (int64_t first = 0; first < count; first += kRun)
    nvfp4_run(x + first, std::min(kRun, count - first), f, codes + first, scales + first / f.size);
}

}  // namespace
