// RMSNorm of a row.
//
// The ladder
//   1  two loops over a row that stays in L1, the same source for every instruction set
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <cmath>

#include "vector.hpp"

namespace {

// out = weight · (x / sqrt(mean x² + eps)).
void rms_norm(const float* x, const float* weight, float eps, int64_t K, float* out) {
  FloatLanes squares{};
  int64_t k = 0;
  for (; k + kWidth <= K; k += kWidth) squares = fused(load(x + k), load(x + k), squares);
  float sum = sum_of(squares);
  for (; k < K; ++k) sum += x[k] * x[k];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(K) + eps);
  for (k = 0; k < K; ++k) out[k] = weight[k] * (x[k] * factor);
}

}  // namespace
