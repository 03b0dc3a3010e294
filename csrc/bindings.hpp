// What Python passes for a weight and for memory.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <tuple>

#include "decoder.hpp"

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Of fewbits/kernels/native.py, weight_fields: which tokens and codes; addresses of panels, scales, table and bias (0:
// none); whether scales are bfloat16; N, K, G, words of a group, and the block of features that is rotated (0: none).
using WeightFields = std::tuple<int32_t, int32_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, bool, int64_t, int64_t,
                                int64_t, int64_t, int64_t>;

inline fewbits::Weight weight_of(const WeightFields& fields) {
  const auto [tokens, codes, packed, scales, table, bias, bf16_scales, N, K, G, words, rotation] = fields;
  const auto kind = static_cast<fewbits::TokenKind>(tokens);
  return {.needs = {kind, kind == fewbits::TokenKind::kInt4 ? G : 1, rotation},
          .panels = {at<const uint8_t>(packed), at<const void>(scales), bf16_scales, N, G, words},
          .how = static_cast<fewbits::Codes>(codes),
          .table = at<const float>(table),
          .bias = at<const float>(bias),
          .K = K};
}
