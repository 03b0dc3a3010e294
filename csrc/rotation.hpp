// rotate: each block of features times the orthogonal Hadamard matrix, H[i][j] = (−1)^popcount(i & j) / sqrt(block).
//
// The ladder, for a block of 64
//   1  six passes over memory, of sums and differences at distance 1, 2, 4, …, 32
//   2  64 features in registers for all six: within a vector by a shuffle and a change of signs, then between vectors
//
// Every instruction set adds the same pairs in the same order: results are bit-equal. Larger blocks go on in memory.
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "vector.hpp"

namespace {

constexpr int64_t kInRegisters = 64;  // features

// Lanes i and i ^ kDistance become their sum and their difference.
template <int64_t kDistance, std::size_t... kLane>
inline __attribute__((always_inline)) FloatLanes with_partner(FloatLanes v, std::index_sequence<kLane...>) {
  const FloatLanes signs = {(kLane & kDistance ? -1.0f : 1.0f)...};
  return __builtin_shufflevector(v, v, (kLane ^ kDistance)...) + v * signs;
}

template <int64_t kDistance = 1>
inline __attribute__((always_inline)) FloatLanes within_vector(FloatLanes v) {
  if constexpr (kDistance < kWidth)
    return within_vector<2 * kDistance>(with_partner<kDistance>(v, std::make_index_sequence<kWidth>()));
  else
    return v;
}

template <int64_t kFeatures>
inline __attribute__((always_inline)) void rotate_in_registers(const float* x, float factor, float* out) {
  constexpr int64_t kVectors = kFeatures / kWidth;
  FloatLanes v[kVectors];
  for (int64_t i = 0; i < kVectors; ++i) v[i] = within_vector(load(x + i * kWidth));
  for (int64_t distance = 1; distance < kVectors; distance *= 2)
    for (int64_t i = 0; i < kVectors; ++i)
      if (!(i & distance)) {
        const FloatLanes first = v[i], second = v[i + distance];
        v[i] = first + second;
        v[i + distance] = first - second;
      }
  for (int64_t i = 0; i < kVectors; ++i) store(out + i * kWidth, v[i] * factor);
}

// A block of 128 features or more, whose pieces of 64 are done: the passes at distance 64, 128, ….
void finish_block(float* x, int64_t block, float factor) {
  for (int64_t distance = kInRegisters; distance < block; distance *= 2) {
    const float last = 2 * distance == block ? factor : 1.0f;
    for (int64_t pair = 0; pair < block; pair += 2 * distance)
      for (int64_t k = pair; k < pair + distance; k += kWidth) {
        const FloatLanes first = load(x + k), second = load(x + k + distance);
        store(x + k, (first + second) * last);
        store(x + k + distance, (first - second) * last);
      }
  }
}

// K features, whole blocks of 16 · 2^n; `out` may be x.
void rotate(const float* x, int64_t K, int64_t block, float* out) {
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int64_t start = 0; start < K; start += block) {
    if (block == 16) rotate_in_registers<16>(x + start, factor, out + start);
    if (block == 32) rotate_in_registers<32>(x + start, factor, out + start);
    for (int64_t k = start; block >= kInRegisters && k < start + block; k += kInRegisters)
      rotate_in_registers<kInRegisters>(x + k, block == kInRegisters ? factor : 1.0f, out + k);
    if (block > kInRegisters) finish_block(out + start, block, factor);
  }
}

}  // namespace
