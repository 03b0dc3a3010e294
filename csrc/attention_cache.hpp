// Keys and values as they are kept, read for few queries: scores of keys, weighted sums of values.
//
// The ladder, for 4 queries after 4096 positions of 64 channels
//   1  a query at a time: every key is loaded and decoded once for each, and its products are summed across lanes
//   2  the queries together, 16 sums in registers: a key is loaded and decoded once for 4 of them
//   3  the 16 sums are added across lanes together, by 15 additions of halves
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include "attention_job.hpp"
#include "quantize_per_token.hpp"
#include "vector.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kChunk = 64;  // positions, whose keys and values stay in L1
constexpr int kRowsAtOnce = 4;  // queries

struct CachedBf16 {
  uint16_t bits;
};

inline float widened(float x) { return x; }
inline float widened(int8_t code) { return static_cast<float>(code); }
inline float widened(CachedBf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

template <class T>
inline __attribute__((always_inline)) FloatLanes load_widened(const T* from) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 1)
    return (FloatLanes)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  if constexpr (sizeof(T) == 2)
    return (FloatLanes)_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 1)
    return (FloatLanes)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  if constexpr (sizeof(T) == 2)
    return (FloatLanes)_mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16));
#endif
  if constexpr (sizeof(T) == 4) return load(from);
  FloatLanes v;
  for (int64_t lane = 0; lane < kWidth; ++lane) v[lane] = widened(from[lane]);
  return v;
}

// Lane i of the result is the sum of v[i]: vectors are added in pairs, half of one beside half of the other.
inline __attribute__((always_inline)) FloatLanes sums_of(FloatLanes* v) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < 8; ++i)
    v[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int64_t i = 0; i < 4; ++i)
    v[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t i = 0; i < 2; ++i)
    v[i] = __builtin_shufflevector(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#else
  FloatLanes sums;
  for (int64_t i = 0; i < kWidth; ++i) sums[i] = sum_of(v[i]);
  return sums;
#endif
}

// scores[r][j] = query r · key j, of Rows queries [Rows, D] and kWidth / Rows keys at a time. Keys beyond `count` are
// taken for the last one; their scores mean nothing.
template <int Rows, class T>
void score_keys(const float* queries, int64_t D, const T* keys, int64_t stride, int64_t count, float* scores) {
  constexpr int64_t kKeys = kWidth / Rows;
  const int64_t whole = D / kWidth * kWidth;
  for (int64_t j = 0; j < count; j += kKeys) {
    const T* key[kKeys];
    for (int64_t i = 0; i < kKeys; ++i) key[i] = keys + std::min(j + i, count - 1) * stride;
    FloatLanes sums[kWidth] = {};
    for (int64_t d = 0; d < whole; d += kWidth)
      for (int64_t i = 0; i < kKeys; ++i) {
        const FloatLanes loaded = load_widened(key[i] + d);
        for (int r = 0; r < Rows; ++r)
          sums[r * kKeys + i] = fused(load(queries + r * D + d), loaded, sums[r * kKeys + i]);
      }
    FloatLanes found = sums_of(sums);
    for (int64_t d = whole; d < D; ++d)
      for (int64_t at = 0; at < kWidth; ++at) found[at] += queries[at / kKeys * D + d] * widened(key[at % kKeys][d]);
    alignas(64) float flat[kWidth];
    store(flat, found);
    for (int r = 0; r < Rows; ++r) std::memcpy(scores + r * kChunk + j, flat + r * kKeys, kKeys * sizeof(float));
  }
}

// sums[r] = sums[r] · factors[r] + Σ weights[r][j] · value_j, of Rows rows.
template <int Rows, class T>
void add_values(const float* weights, const float* factors, const T* values, int64_t stride, int64_t count, int64_t D,
                float* sums) {
  constexpr int kVectors = Rows == 1 || kWidth == 16 ? 4 : 2;  // 4 × 4 sums fit 32 registers, 4 × 2 fit 16
  int64_t d = 0;
  const auto columns = [&]<int Vectors>() {
    FloatLanes sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int i = 0; i < Vectors; ++i) sum[r][i] = load(sums + r * D + d + i * kWidth) * factors[r];
    for (int64_t j = 0; j < count; ++j) {
      FloatLanes value[Vectors];
      for (int i = 0; i < Vectors; ++i) value[i] = load_widened(values + j * stride + d + i * kWidth);
      for (int r = 0; r < Rows; ++r)
        for (int i = 0; i < Vectors; ++i) sum[r][i] = fused(all(weights[r * kChunk + j]), value[i], sum[r][i]);
    }
    for (int r = 0; r < Rows; ++r)
      for (int i = 0; i < Vectors; ++i) store(sums + r * D + d + i * kWidth, sum[r][i]);
  };
  for (; d + kVectors * kWidth <= D; d += kVectors * kWidth) columns.template operator()<kVectors>();
  for (; d + kWidth <= D; d += kWidth) columns.template operator()<1>();
  for (; d < D; ++d)
    for (int r = 0; r < Rows; ++r) {
      float sum = sums[r * D + d] * factors[r];
      for (int64_t j = 0; j < count; ++j) sum += weights[r * kChunk + j] * widened(values[j * stride + d]);
      sums[r * D + d] = sum;
    }
}

// A token of the cache [D], written: as it is, or quantized as quantize_per_token does.
inline void write_token(const fewbits::Attention& job, const fewbits::CacheTensor& to, int64_t b, int64_t g, int64_t s,
                        const float* x) {
  const int64_t at = b * to.batch + g * to.head + s * to.token;
  if (job.type == fewbits::CacheType::kInt8)
    quantize_per_token(x, job.D, 0, 1, static_cast<int8_t*>(to.data) + at, to.scales + at / job.D);
  else
    std::memcpy(static_cast<float*>(to.data) + at, x, static_cast<size_t>(job.D) * sizeof(float));
}

// Tokens [s, s + count) of one text and group, widened: element [j][d] goes to out[j · row + d · column].
template <class T>
void read_tokens(const T* from, const float* scales, int64_t stride, int64_t count, int64_t D, float* out, int64_t row,
                 int64_t column) {
  for (int64_t j = 0; j < count; ++j) {
    const float scale = scales ? scales[j] : 1.0f;
    for (int64_t d = 0; d < D; ++d) out[j * row + d * column] = widened(from[j * stride + d]) * scale;
  }
}

// Calls `work` with a pointer to the first token of text b and group g, of its own type, and with its scales or null.
template <class Work>
void of_type(const fewbits::Attention& job, const fewbits::CacheTensor& cache, int64_t b, int64_t g, const Work& work) {
  const int64_t at = b * cache.batch + g * cache.head;
  switch (job.type) {
    case fewbits::CacheType::kFloat32:
      return work(static_cast<const float*>(cache.data) + at, nullptr);
    case fewbits::CacheType::kBFloat16:
      return work(static_cast<const CachedBf16*>(cache.data) + at, nullptr);
    case fewbits::CacheType::kInt8:
      return work(static_cast<const int8_t*>(cache.data) + at, cache.scales + at / job.D);
  }
}

}  // namespace
