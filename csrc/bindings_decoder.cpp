// Python sees a decoder layer as an object made of addresses and sizes; fewbits/models/fused.py keeps the tensors
// alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "bindings.hpp"
#include "drive_attention.hpp"
#include "drive_decoder.hpp"

namespace nb = nanobind;

using fewbits::DecoderCall;
using fewbits::DecoderLayer;

namespace {

fewbits::Weight weight_of(nb::handle fields) { return ::weight_of(nb::cast<WeightFields>(fields)); }

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

// Addresses of the first token and of its scale (0: none), and strides of texts, heads and tokens.
using CacheFields = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;

fewbits::CacheTensor cache_of(const CacheFields& fields) {
  const auto [data, scales, batch, head, token] = fields;
  return {at<void>(data), at<float>(scales), batch, head, token};
}

// `strides` are those of the queries, in floats: of a text, a token, a head.
void attention(uintptr_t queries, const std::tuple<int64_t, int64_t, int64_t>& strides, uintptr_t out, int32_t type,
               const CacheFields& keys, const CacheFields& values, int64_t B, int64_t T, int64_t S, int64_t Q,
               int64_t G, int64_t D, uintptr_t mask, int64_t mask_batch, int64_t mask_row, bool causal, float scale,
               int threads) {
  const auto [batch, token, head] = strides;
  const fewbits::Attention job{.queries = at<const float>(queries),
                               .query_batch = batch,
                               .query_token = token,
                               .query_head = head,
                               .new_keys = nullptr,
                               .new_values = nullptr,
                               .out = at<float>(out),
                               .type = static_cast<fewbits::CacheType>(type),
                               .keys = cache_of(keys),
                               .values = cache_of(values),
                               .B = B,
                               .T = T,
                               .Q = Q,
                               .G = G,
                               .D = D,
                               .past = S - T,
                               .cos = nullptr,
                               .sin = nullptr,
                               .R = 0,
                               .rotary_batch = 0,
                               .interleaved = false,
                               .q_norm = nullptr,
                               .k_norm = nullptr,
                               .eps = 0,
                               .mask = at<const uint8_t>(mask),
                               .mask_batch = mask_batch,
                               .mask_row = mask_row,
                               .causal = causal,
                               .scale = scale};
  fewbits::attention(job, threads);
}

}  // namespace

void bind_decoder(nb::module_& m) {
  m.def("attention", &attention, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<DecoderLayer>(m, "DecoderLayer")
      .def("__init__", &make_layer)
      .def(
          "run",
          [](const DecoderLayer& self, uintptr_t x, uintptr_t out, int64_t B, int64_t T, int64_t past, uintptr_t cos,
             uintptr_t sin, int64_t R, int64_t rotary_batch, int32_t cache, const CacheFields& keys,
             const CacheFields& values, uintptr_t mask, int64_t mask_batch, int64_t mask_row, int threads) {
            const DecoderCall call{at<const float>(x),
                                   at<float>(out),
                                   B,
                                   T,
                                   past,
                                   at<const float>(cos),
                                   at<const float>(sin),
                                   R,
                                   rotary_batch,
                                   static_cast<fewbits::CacheType>(cache),
                                   cache_of(keys),
                                   cache_of(values),
                                   at<const uint8_t>(mask),
                                   mask_batch,
                                   mask_row};
            fewbits::decoder_layer(self, call, threads);
          },
          nb::call_guard<nb::gil_scoped_release>());
}
