// A whole decoder layer of the Llama kind in one call.
#pragma once

#include "decoder.hpp"

namespace fewbits {

struct DecoderLayer {
  Weight qkv[3], o, gate_up[2], down;
  const float *input_norm, *post_norm;  // [H]
  const float *q_norm, *k_norm;         // [D] or null
  float eps, post_eps, head_eps;
  int64_t H, Q, G, D;
  bool interleaved;
  float scale;
};

struct DecoderCall {
  const float* x;  // [M, H]
  float* out;      // [M, H]
  int64_t B, T, past;
  const float *cos, *sin;  // [1 or B, T, R]
  int64_t R, rotary_batch;
  CacheType cache;
  CacheTensor keys, values;  // [B, G, ≥ past + T, D]; the new tokens are written there
  const uint8_t* mask;       // [B, T, past + T] or null
  int64_t mask_batch, mask_row;
};

void decoder_layer(const DecoderLayer& layer, const DecoderCall& call, int threads);

}  // namespace fewbits
