// Vectors of floats as wide as the instruction set, and the few functions on them that layers need.
//
// GCC and Clang give such types arithmetic on every instruction set, so that one source serves all of them; sums of
// different widths differ in their last bits. Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
#elif defined(__AVX2__)
constexpr int64_t kWidth = 8;
#else
constexpr int64_t kWidth = 4;
#endif

typedef float FloatLanes __attribute__((vector_size(kWidth * 4)));
typedef int32_t LaneInts __attribute__((vector_size(kWidth * 4)));

inline __attribute__((always_inline)) FloatLanes load(const float* from) {
  FloatLanes v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline __attribute__((always_inline)) void store(float* to, FloatLanes v) { std::memcpy(to, &v, sizeof v); }

inline __attribute__((always_inline)) FloatLanes all(float value) { return FloatLanes{} + value; }

// a · b + c; one rounding where there is an instruction for it: sums of products have a tolerance anyway.
inline __attribute__((always_inline)) FloatLanes fused(FloatLanes a, FloatLanes b, FloatLanes c) {
#if defined(__AVX512F__)
  return (FloatLanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

// Halves added until four are left, then pairs.
inline __attribute__((always_inline)) float sum_of(FloatLanes v) {
#if defined(__AVX512F__)
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  const FloatLanes eight = v;
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
  const auto four =
      __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  const FloatLanes four = v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

inline __attribute__((always_inline)) FloatLanes larger(FloatLanes a, FloatLanes b) { return a > b ? a : b; }

inline __attribute__((always_inline)) float largest_of(FloatLanes v) {
  float most = v[0];
  for (int64_t lane = 1; lane < kWidth; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
}

// e^x within 2 ULP for x ≤ 88, where it stays; 0 below −87, NaN for NaN.
//   1  n = round(x / ln 2), by an addition whose ulp is 1
//   2  r = x − n · ln 2, in two parts of ln 2, |r| ≤ 0.35
//   3  e^r by its series to r^6 / 6! (the next term is below 2^-24), times 2^n put into the exponent
inline __attribute__((always_inline)) FloatLanes exponential(FloatLanes x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23
  const FloatLanes bounded = x > 88.0f ? all(88.0f) : x;
  const FloatLanes shifted = fused(bounded, all(1.44269504f), all(kMagic));
  const FloatLanes n = shifted - kMagic;
  FloatLanes r = fused(n, all(-0.693359375f), bounded);  // 355 / 512, exact times any n
  r = fused(n, all(2.12194440e-4f), r);                  // 355 / 512 − ln 2
  FloatLanes series = all(1.0f / 720);
  for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) series = fused(series, r, all(term));
  LaneInts power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power - 0x4B400000 + 127) << 23;  // the bits of kMagic
  FloatLanes scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x < -87.0f ? FloatLanes{} : series * scale;
}

inline __attribute__((always_inline)) FloatLanes silu(FloatLanes x) { return x / (1.0f + exponential(-x)); }

}  // namespace
