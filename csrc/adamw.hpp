// The elementwise parts of adamw and gradient_stats, on chunks that the first cache holds; drive_adamw.cpp joins them.
//
// The ladder
//   1  plain loops that the compiler vectorizes: square roots and divisions round correctly on every instruction set
//   2  sums of squares in 16 lanes of doubles, in the order that the meaning in Python has too
//   3  Inf and NaN are counted only where the largest word is not finite
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "adamw_job.hpp"

namespace {

// One AdamW update. With kKahan the change goes to `change`, and w stays.
template <bool kKahan>
void adamw_loop(const float* __restrict g, float* __restrict w, float* __restrict m, float* __restrict v,
                float* __restrict change, int64_t n, const fewbits::AdamwCoefficients& coefficients) {
  const fewbits::AdamwCoefficients c = coefficients;
  for (int64_t i = 0; i < n; ++i) {
    const float gradient = g[i] * c.factor;
    const float first = m[i] + (gradient - m[i]) * c.first_weight;
    const float second = v[i] * c.second_keep + (gradient * gradient) * c.second_weight;
    const float step = first / (__builtin_sqrtf(second) * c.root_scale + c.eps) * c.step_size;
    m[i] = first;
    v[i] = second;
    if constexpr (kKahan) {
      change[i] = w[i] * c.decay_rate - step;
    } else {
      w[i] = w[i] * c.decay - step;
    }
  }
}

void adamw(const float* g, float* w, float* m, float* v, float* change, int64_t n,
           const fewbits::AdamwCoefficients& c) {
  if (change) return adamw_loop<true>(g, w, m, v, change, n, c);
  adamw_loop<false>(g, w, m, v, nullptr, n, c);
}

// w + u, rounded to bfloat16 in `narrow`, is the new weight; what that loses is the new `lost`. u = lost + change.
void kahan_change(float* __restrict lost, const float* __restrict change, const float* __restrict w,
                  float* __restrict sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    lost[i] = lost[i] + change[i];
    sum[i] = w[i] + lost[i];
  }
}

void kahan_lost(float* __restrict lost, const float* __restrict w, const float* __restrict rounded, int64_t n) {
  for (int64_t i = 0; i < n; ++i) lost[i] = lost[i] + (w[i] - rounded[i]);
}

//   float32 word: | high: upper half of word + 2^15 |   low: word - high · 2^16
void split_weights(const float* __restrict w, uint16_t* __restrict high, uint16_t* __restrict low, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = std::bit_cast<uint32_t>(w[i]);
    const uint32_t upper = (word + 0x8000u) >> 16;
    high[i] = static_cast<uint16_t>(upper);
    low[i] = static_cast<uint16_t>(word - (upper << 16));
  }
}

void join_weights(const uint16_t* __restrict high, const uint16_t* __restrict low, float* __restrict w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t difference = static_cast<int16_t>(low[i]);
    w[i] = std::bit_cast<float>((static_cast<uint32_t>(high[i]) << 16) + static_cast<uint32_t>(difference));
  }
}

// x of one block -> scaled to the range of the codes; returns the scale. kRoot: of the roots of x, never 0 if x is not.
float scale_block(const float* __restrict x, float* __restrict scaled, int64_t n, bool root,
                  const fewbits::StateCodes& codes) {
  uint32_t largest = 0;
  if (root) {
    for (int64_t i = 0; i < n; ++i) scaled[i] = __builtin_sqrtf(x[i]);
  } else {
    std::memcpy(scaled, x, static_cast<size_t>(n) * sizeof(float));
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(scaled[i]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float amax = std::bit_cast<float>(largest);
  const bool kept = amax >= codes.no_scale_below;
  const float inverse = kept ? codes.largest / amax : 0.0f;
  const float least = root ? codes.least : 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float value = scaled[i] * inverse;
    scaled[i] = value > 0.0f && value < least ? least : value;
  }
  return kept ? amax / codes.largest : 0.0f;
}

void unscale_block(float* __restrict x, int64_t n, float scale, bool root) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = x[i] * scale;
    x[i] = root ? value * value : value;
  }
}

// Doubles as wide as the registers, so that 16 lanes stay in them.
#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#elif defined(__AVX2__)
constexpr int kDoubles = 4;
#else
constexpr int kDoubles = 2;
#endif
typedef float StatsFloats __attribute__((vector_size(4 * kDoubles)));
typedef double StatsDoubles __attribute__((vector_size(8 * kDoubles)));
constexpr int kSquareLanes = 16;
constexpr int kSquareVectors = kSquareLanes / kDoubles;

inline void add_squares(const float* x, StatsDoubles* sums) {
  for (int vector = 0; vector < kSquareVectors; ++vector) {
    StatsFloats part;
    std::memcpy(&part, x + vector * kDoubles, sizeof part);
    const StatsDoubles wide = __builtin_convertvector(part, StatsDoubles);
    sums[vector] += wide * wide;
  }
}

// Element i of a chunk is added to lane i mod 16, then the halves of the lanes are added until one is left.
double sum_of_squares(const float* x, int64_t n) {
  StatsDoubles sums[kSquareVectors] = {};
  const int64_t whole = n / kSquareLanes * kSquareLanes;
  for (int64_t i = 0; i < whole; i += kSquareLanes) add_squares(x + i, sums);
  if (whole < n) {
    float last[kSquareLanes] = {};
    std::memcpy(last, x + whole, static_cast<size_t>(n - whole) * sizeof(float));
    add_squares(last, sums);
  }
  double lanes[kSquareLanes];
  std::memcpy(lanes, sums, sizeof lanes);
  for (int half = kSquareLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Inf and NaN, the largest finite magnitude, and the sum of squares of at most 4096 values. Nearly always all are
// finite, and the largest word says so.
void gradient_stats(const float* __restrict x, int64_t n, fewbits::GradientStats* out) {
  constexpr int32_t kInf = 0x7F800000;
  int32_t largest = 0, infinite = 0, nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = std::bit_cast<int32_t>(x[i]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= kInf) {
    largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t magnitude = std::bit_cast<int32_t>(x[i]) & 0x7FFFFFFF;
      infinite += magnitude == kInf;
      nan += magnitude > kInf;
      if (magnitude < kInf && magnitude > largest) largest = magnitude;
    }
  }
  *out = {infinite, nan, std::bit_cast<float>(largest), sum_of_squares(x, n)};
}

}  // namespace
