// The table of kernels, from whichever versions the including file's instruction set selects.
//
// Included once per instruction set. Constant-initialized: loading the library runs no code of a set the CPU lacks.
#pragma once

#include "../adamw.hpp"
#include "../attention_block.hpp"
#include "../block.hpp"
#include "../cast.hpp"
#include "../int8_matmul.hpp"
#include "../linear.hpp"
#include "../quantize_per_token.hpp"
#include "../quantize_weight.hpp"
#include "../rotation.hpp"
#include "../tokens.hpp"

namespace {

constexpr fewbits::Kernels table(const char* name) {
  return {
      .name = name,
      .quantize_per_token = quantize_per_token,
      .rotate = rotate,
      .quantize_weight = quantize_weight,
      .int8_pack_rows = int8_pack_rows,
      .int8_matmul = int8_matmul,
      .make_tokens = make_tokens,
      .linear = linear,
      .make_digits = make_digits,
      .linear_digits = linear_digits,
      .fill_caches = fill_caches,
      .attend_few = attend_few,
      .merge_partials = merge_partials,
      .attention_units = attention_units,
      .attention_scratch = attention_scratch,
      .attend_block = attend_block,
      .encode_floats = encode_floats,
      .decode_codes = decode_codes,
      .decode = decode,
      .mx_encode = mx_encode,
      .nvfp4_encode = nvfp4_encode,
      .finite_amax = finite_amax,
      .pack_nibbles = pack_nibbles,
      .adamw = adamw,
      .kahan_change = kahan_change,
      .kahan_lost = kahan_lost,
      .split_weights = split_weights,
      .join_weights = join_weights,
      .scale_block = scale_block,
      .unscale_block = unscale_block,
      .gradient_stats = gradient_stats,
      .stream_out = stream_out,
      .end_stream = end_stream,
  };
}

}  // namespace
