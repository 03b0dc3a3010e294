// Python sees a decoder layer as an object made of addresses and sizes; fewbits/models/fused.py keeps the tensors
// alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "drive_decoder.hpp"

namespace nb = nanobind;

using fewbits::DecoderCall;
using fewbits::DecoderLayer;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

fewbits::Weight weight_of(nb::handle fields) {
  const auto [packed, scales, bias, N, K] =
      nb::cast<std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>>(fields);
  return {
      fewbits::WeightKind::kInt8, at<const int8_t>(packed), at<const float>(scales), at<const float>(bias), N, K, K};
}

void make_layer(DecoderLayer* self, nb::kwargs fields) {
  const auto address = [&](const char* name) { return at<const float>(nb::cast<uintptr_t>(fields[name])); };
  const auto number = [&](const char* name) { return nb::cast<int64_t>(fields[name]); };
  const auto real = [&](const char* name) { return nb::cast<float>(fields[name]); };
  new (self) DecoderLayer{{weight_of(fields["query"]), weight_of(fields["key"]), weight_of(fields["value"])},
                          weight_of(fields["output"]),
                          {weight_of(fields["gate"]), weight_of(fields["up"])},
                          weight_of(fields["down"]),
                          address("input_norm"),
                          address("post_norm"),
                          address("q_norm"),
                          address("k_norm"),
                          real("eps"),
                          real("post_eps"),
                          real("head_eps"),
                          number("H"),
                          number("Q"),
                          number("G"),
                          number("D"),
                          number("interleaved") != 0,
                          real("scale")};
}

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<DecoderLayer>(m, "DecoderLayer")
      .def("__init__", &make_layer)
      .def(
          "run",
          [](const DecoderLayer& self, uintptr_t x, uintptr_t out, int64_t B, int64_t T, int64_t past, uintptr_t cos,
             uintptr_t sin, int64_t R, int64_t rotary_batch, uintptr_t keys, uintptr_t values, int64_t key_batch,
             int64_t key_head, int64_t value_batch, int64_t value_head, uintptr_t mask, int64_t mask_batch,
             int64_t mask_row, int threads) {
            const DecoderCall call{at<const float>(x),
                                   at<float>(out),
                                   B,
                                   T,
                                   past,
                                   at<const float>(cos),
                                   at<const float>(sin),
                                   R,
                                   rotary_batch,
                                   at<float>(keys),
                                   at<float>(values),
                                   key_batch,
                                   key_head,
                                   value_batch,
                                   value_head,
                                   at<const uint8_t>(mask),
                                   mask_batch,
                                   mask_row};
            fewbits::decoder_layer(self, call, threads);
          },
          nb::call_guard<nb::gil_scoped_release>());
}
