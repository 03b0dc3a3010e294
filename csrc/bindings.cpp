// Python sees addresses and sizes only; shapes and dtypes are checked in fewbits/kernels/ops.py.
#include "bindings.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>

#include <algorithm>

#include "drive.hpp"
#include "parallel.hpp"

namespace nb = nanobind;
using namespace nb::literals;

void bind_decoder(nb::module_& m);  // bindings_decoder.cpp

NB_MODULE(_native, m) {
  bind_decoder(m);
  m.def("isa", [] { return fewbits::chosen().kernels->name; });
  m.def("reason", [] { return fewbits::chosen().reason; });
  m.def("has_pool", &fewbits::has_pool);

  m.def(
      "quantize_per_token",
      [](uintptr_t x, int64_t M, int64_t K, uintptr_t codes, uintptr_t scales, int threads) {
        fewbits::quantize_per_token(at<const float>(x), M, K, at<int8_t>(codes), at<float>(scales), threads);
      },
      nb::call_guard<nb::gil_scoped_release>());

  m.def(
      "rotate",
      [](uintptr_t x, int64_t M, int64_t K, int64_t block, uintptr_t out, int threads) {
        fewbits::rotate(at<const float>(x), M, K, block, at<float>(out), threads);
      },
      nb::call_guard<nb::gil_scoped_release>());

  m.def(
      "pack_int8",
      [](uintptr_t weight, int64_t N, int64_t K, uintptr_t packed, int threads) {
        fewbits::pack_int8(at<const int8_t>(weight), N, K, at<int8_t>(packed), threads);
      },
      nb::call_guard<nb::gil_scoped_release>());

  m.def(
      "int8_matmul",
      [](uintptr_t codes, uintptr_t token_scales, uintptr_t packed, uintptr_t channel_scales, uintptr_t bias,
         uintptr_t out, int64_t M, int64_t N, int64_t K, int threads) {
        fewbits::int8_matmul({at<const int8_t>(codes), at<const float>(token_scales), at<const int8_t>(packed),
                              at<const float>(channel_scales), at<const float>(bias), at<float>(out), M, N, K, nullptr},
                             threads);
      },
      nb::call_guard<nb::gil_scoped_release>());

  m.def(
      "int8_linear",
      [](uintptr_t x, uintptr_t packed, uintptr_t channel_scales, uintptr_t bias, uintptr_t out, int64_t M, int64_t N,
         int64_t K, int threads) {
        fewbits::int8_linear(at<const float>(x), at<const int8_t>(packed), at<const float>(channel_scales),
                             at<const float>(bias), at<float>(out), M, N, K, threads);
      },
      nb::call_guard<nb::gil_scoped_release>());

  m.def(
      "int8_linear_two_digits",
      [](uintptr_t x, uintptr_t packed, uintptr_t channel_scales, uintptr_t bias, uintptr_t out, int64_t M, int64_t N,
         int64_t K, int threads) {
        fewbits::int8_linear_two_digits(at<const float>(x), at<const int8_t>(packed), at<const float>(channel_scales),
                                        at<const float>(bias), at<float>(out), M, N, K, threads);
      },
      nb::call_guard<nb::gil_scoped_release>());

  m.def(
      "panel_linear",
      [](uintptr_t x, const WeightFields& weight, uintptr_t out, int64_t M, int threads) {
        fewbits::panel_linear(at<const float>(x), weight_of(weight), at<float>(out), M, threads);
      },
      nb::call_guard<nb::gil_scoped_release>());

  m.def(
      "quantize_weight",
      [](uintptr_t weight, int64_t N, int64_t K, int64_t group, int64_t rotation, bool bf16_weight, bool bf16_scales,
         bool nibbles, float divisor, int32_t low, int32_t high, uintptr_t codes, uintptr_t scales, int threads) {
        return fewbits::quantize_weight({at<const void>(weight), N, K, group, rotation, bf16_weight, bf16_scales,
                                         nibbles, divisor, low, high, at<int8_t>(codes), at<float>(scales)},
                                        threads);
      },
      nb::call_guard<nb::gil_scoped_release>());

  using fewbits::Codec;
  using fewbits::Rounder;
  nb::class_<Codec>(m, "Codec").def("__init__", [](Codec* self, nb::kwargs fields) {
    auto number = [&](const char* name) { return nb::cast<int32_t>(fields[name]); };
    new (self) Codec{number("sign"),           number("bits"),         number("mantissa_bits"), number("emin"),
                     number("has_subnormals"), number("max_code"),     number("max_negative"),  number("inf_code"),
                     number("nan_code"),       number("nan_above"),    number("nan_exactly"),   number("signed_from"),
                     number("never_signed"),   number("negative_code")};
  });
  nb::class_<Rounder>(m, "Rounder")
      .def("__init__", [](Rounder* self, const Codec& codec, int32_t rounding, std::pair<int32_t, int32_t> over,
                          std::pair<int32_t, int32_t> inf, uint64_t key) {
        new (self) Rounder{codec, rounding, {over.first, over.second}, {inf.first, inf.second}, key};
      });

  m.def(
      "encode",
      [](uintptr_t x, const Codec* source, int64_t count, const Rounder& rounder, bool nibbles, bool fresh,
         uintptr_t codes, int threads) {
        fewbits::encode(at<const void>(x), source, count, rounder, nibbles, fresh, at<void>(codes), threads);
      },
      "x"_a, "source"_a.none(), "count"_a, "rounder"_a, "nibbles"_a, "fresh"_a, "codes"_a, "threads"_a,
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "decode",
      [](uintptr_t codes, const Codec& codec, int64_t count, bool nibbles, const Rounder* narrow, bool fresh,
         uintptr_t out, int threads) {
        return fewbits::decode(at<const void>(codes), codec, count, nibbles, narrow, fresh, at<void>(out), threads);
      },
      "codes"_a, "codec"_a, "count"_a, "nibbles"_a, "narrow"_a.none(), "fresh"_a, "out"_a, "threads"_a,
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "round",
      [](uintptr_t x, const Codec* source, int64_t count, const Rounder& rounder, const Rounder* narrow, bool fresh,
         uintptr_t out, int threads) {
        fewbits::round(at<const void>(x), source, count, rounder, narrow, fresh, at<void>(out), threads);
      },
      "x"_a, "source"_a.none(), "count"_a, "rounder"_a, "narrow"_a.none(), "fresh"_a, "out"_a, "threads"_a,
      nb::call_guard<nb::gil_scoped_release>());

  nb::class_<fewbits::AdamwFormats>(m, "AdamwFormats")
      .def("__init__",
           [](fewbits::AdamwFormats* self, const Rounder& bf16, const Rounder& fp16, const Rounder& bf16_stochastic,
              const Rounder& codes_stochastic, float largest, float least, float no_scale_below) {
             new (self)
                 fewbits::AdamwFormats{bf16, fp16, bf16_stochastic, codes_stochastic, {largest, least, no_scale_below}};
           });
  m.def(
      "adamw",
      [](uintptr_t tensors, uintptr_t coefficients, int64_t count, const fewbits::AdamwFormats& formats, int threads) {
        fewbits::adamw(at<const fewbits::AdamwTensor>(tensors), at<const fewbits::AdamwCoefficients>(coefficients),
                       count, formats, threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "gradient_stats",
      [](uintptr_t tensors, int64_t count, const fewbits::AdamwFormats& formats, uintptr_t out, int threads) {
        fewbits::gradient_stats(at<const fewbits::GradientTensor>(tensors), count, formats, at<double>(out), threads);
      },
      nb::call_guard<nb::gil_scoped_release>());

  m.def(
      "mx_encode",
      [](uintptr_t x, int64_t M, int64_t K, const Rounder& element, int32_t size, int32_t emax, int64_t round_up_above,
         int32_t nan_scale, uintptr_t codes, uintptr_t scales, int threads) {
        fewbits::mx_encode(at<const float>(x), M, K, {element, size, emax, round_up_above, nan_scale},
                           at<uint8_t>(codes), at<uint8_t>(scales), threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "nvfp4_encode",
      [](uintptr_t x, int64_t M, int64_t K, const Rounder& element, const Codec& scale, int32_t size,
         double element_max, double tensor_scale, std::array<double, 7> bounds, uintptr_t codes, uintptr_t scales,
         int threads) {
        fewbits::Nvfp4Format format{element, scale, size, element_max, tensor_scale, {}};
        std::copy(bounds.begin(), bounds.end(), format.bounds);
        fewbits::nvfp4_encode(at<const float>(x), M, K, format, at<uint8_t>(codes), at<uint8_t>(scales), threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "finite_amax",
      [](uintptr_t x, int64_t count, int threads) { return fewbits::finite_amax(at<const float>(x), count, threads); },
      nb::call_guard<nb::gil_scoped_release>());
}
