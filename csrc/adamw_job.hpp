// One parameter of the optimizer's sweep, as Python lays it out; see fewbits/kernels/adamw.py.
#pragma once

#include <cstdint>

#include "cast_job.hpp"

namespace fewbits {

struct AdamwCoefficients {
  float factor, first_weight, second_keep, second_weight, root_scale, eps, step_size, decay, decay_rate;
};

enum FloatKind : int64_t { kFloat32, kBfloat16, kFloat16 };
enum MasterKind : int64_t { kMasterFp32, kMasterSplit, kMasterKahan, kMasterStochastic };
enum StateKind : int64_t { kStateFp32, kStateBf16, kState8bit };

// Addresses and choices of one parameter: a row of int64.
struct AdamwTensor {
  int64_t count;
  int64_t gradient, gradient_kind;
  int64_t weight, master;
  int64_t low;  // remainder of a split master, what a kahan master has lost
  int64_t m, v, state;
  int64_t m_scales, v_scales;  // of 8-bit states: one float32 to 256
  int64_t copy, copy_kind;     // the low-precision copy of the weight, or 0
  uint64_t weight_key, m_key, v_key;
};

struct StateCodes {
  float largest, least, no_scale_below;
};

// The formats of the sweep.
struct AdamwFormats {
  Rounder bf16, fp16, bf16_stochastic, codes_stochastic;
  StateCodes codes;
};

struct GradientTensor {
  int64_t count, gradient, kind;
};

struct GradientStats {
  int32_t infinite, nan;
  float amax;
  double sum_of_squares;
};

}  // namespace fewbits
