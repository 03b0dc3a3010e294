// Python sees addresses and sizes only; shapes and dtypes are checked in fewbits/kernels/ops.py.
#include <nanobind/nanobind.h>

#include "drive.hpp"
#include "parallel.hpp"

namespace nb = nanobind;
using namespace nb::literals;

template <class T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

NB_MODULE(_native, m) {
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
      "int8_matmul",
      [](uintptr_t codes, uintptr_t token_scales, uintptr_t packed, uintptr_t channel_scales, uintptr_t bias,
         uintptr_t out, int64_t M, int64_t N, int64_t K, int threads) {
        fewbits::int8_matmul({at<const int8_t>(codes), at<const float>(token_scales), at<const int8_t>(packed),
                              at<const float>(channel_scales), at<const float>(bias), at<float>(out), M, N, K, nullptr},
                             threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
}
