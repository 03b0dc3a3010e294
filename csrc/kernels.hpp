// What every instruction set provides: one table of function pointers, filled by each file in isa/.
//
// Letters: M tokens (rows), K input features, N output channels.
#pragma once

#include <cstdint>

#include "adamw_job.hpp"
#include "cast_job.hpp"
#include "decoder.hpp"
#include "panel_weight.hpp"

namespace fewbits {

// Packed int8 weights. A panel holds kChannels output channels; the last one is padded with zeros.
//
//   panel: | 32 int32: 128 · Σ_k w[n][k] | k 0-3 of channel 0 | k 0-3 of channel 1 | … | k 4-7 of channel 0 | …
//          |<------- 128 bytes --------->|<---- 4 bytes ---->|
//
// A decode step reads a panel as one contiguous stream; one 64-byte load feeds 16 channels × 4 features.
constexpr int64_t kChannels = 32;
constexpr int64_t kGroup = 4;                       // features of one channel that lie together
constexpr int64_t kStepBytes = kChannels * kGroup;  // bytes of a panel for 4 features
constexpr int64_t kHeaderBytes = kChannels * sizeof(int32_t);
constexpr int64_t kTileRows = 12;  // 12 rows × 2 vectors of 16 sums fill 24 of 32 registers

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Int8Matmul {
  const int8_t* codes;          // [M, K]
  const float* token_scales;    // [M]
  const int8_t* packed;         // panels
  const float* channel_scales;  // [N]
  const float* bias;            // [N] or null
  float* out;                   // [M, N]
  int64_t M, N, K;
  uint8_t* tiles;  // scratch, tile_bytes(): the codes as unsigned bytes, by row tile

  int64_t steps() const { return ceil_div(K, kGroup); }
  int64_t panels() const { return ceil_div(N, kChannels); }
  int64_t row_tiles() const { return ceil_div(M, kTileRows); }
  int64_t tile_bytes() const { return M * steps() * kGroup; }
  int64_t panel_bytes() const { return kHeaderBytes + steps() * kStepBytes; }
  int64_t rows_of(int64_t tile) const { return tile + 1 < row_tiles() ? kTileRows : M - tile * kTileRows; }
  uint8_t* tile(int64_t index) const { return tiles + index * kTileRows * steps() * kGroup; }
  const int8_t* panel(int64_t index) const { return packed + index * panel_bytes(); }
};

// A weight to quantize, and where its codes and scales go.
struct WeightJob {
  const void* weight;  // [N, K] float32 or bfloat16
  int64_t N, K, group;
  int64_t rotation;  // features of a block, or 0
  bool bf16_weight, bf16_scales, nibbles;
  float divisor;      // scale = max|w| / divisor
  int32_t low, high;  // the least and the greatest code
  int8_t* codes;      // [N, K], or [N, K / 2] with nibbles
  float* scales;      // [N, K / group]
};

struct Kernels {
  const char* name;
  // Rows [begin, end) of x [M, K] -> codes [M, K], scales [M].
  void (*quantize_per_token)(const float* x, int64_t K, int64_t begin, int64_t end, int8_t* codes, float* scales);
  // K features in whole blocks, times an orthogonal Hadamard matrix; in place where that is wanted.
  void (*rotate)(const float* x, int64_t K, int64_t block, float* out);
  // Rows [begin, end); whether a weight or a scale was not finite.
  bool (*quantize_weight)(const WeightJob& job, int64_t begin, int64_t end);
  // Row tiles [begin, end) of the codes, laid out for int8_matmul.
  void (*int8_pack_rows)(const Int8Matmul& job, int64_t begin, int64_t end);
  // Output tiles [begin, end), counted panel by panel, row tile by row tile.
  void (*int8_matmul)(const Int8Matmul& job, int64_t begin, int64_t end);
  // Parts of a decoder layer (decoder.hpp): rows, units, tokens by group, positions, units.
  void (*make_tokens)(const Rows& rows, const Tokens& tokens, float* scratch, int64_t begin, int64_t end);
  void (*linear)(const Linear& job, int64_t begin, int64_t end);
  void (*make_digits)(const float* x, const Tokens& tokens, float* scratch, int64_t begin, int64_t end);
  void (*linear_digits)(const Linear& job, int64_t begin, int64_t end);
  void (*fill_caches)(const Attention& job, int64_t begin, int64_t end, float* scratch);
  void (*attend_few)(const Attention& job, int64_t b, int64_t g, int64_t from, int64_t to, float* scratch,
                     const Partial& partial);
  void (*merge_partials)(const Partial* partials, int64_t count, int64_t row, int64_t D, float* out);
  int64_t (*attention_units)(const Attention& job);
  int64_t (*attention_scratch)(const Attention& job);  // floats
  void (*attend_block)(const Attention& job, int64_t unit, float* scratch);
  // float32 -> codes, position of the first one in its tensor; codes -> float32, and the bits that
  // any code has; memcpy past the caches, and the wait that ends it.
  void (*encode_floats)(const float* x, int64_t count, void* codes, const Rounder& rounder, uint64_t position);
  uint32_t (*decode_codes)(const void* codes, int64_t count, float* out, const Codec& codec);
  // The same for all that decoding needs, and past the caches where that is wanted.
  uint32_t (*decode)(const uint8_t* codes, bool nibbles, int64_t count, float* out, const Decoding& how,
                     bool past_caches);
  // A run of whole blocks, the last one perhaps short -> codes, one scale code a block.
  void (*mx_encode)(const float* x, int64_t count, const MxFormat& format, uint8_t* codes, uint8_t* scales);
  void (*nvfp4_encode)(const float* x, int64_t count, const Nvfp4Format& format, uint8_t* codes, uint8_t* scales);
  float (*finite_amax)(const float* x, int64_t count);
  void (*pack_nibbles)(const uint8_t* codes, int64_t bytes, uint8_t* packed);
  // See adamw.hpp: parts of the optimizer's sweep, and the statistics of a gradient.
  void (*adamw)(const float* g, float* w, float* m, float* v, float* change, int64_t n, const AdamwCoefficients& c);
  void (*kahan_change)(float* lost, const float* change, const float* w, float* sum, int64_t n);
  void (*kahan_lost)(float* lost, const float* w, const float* rounded, int64_t n);
  void (*split_weights)(const float* w, uint16_t* high, uint16_t* low, int64_t n);
  void (*join_weights)(const uint16_t* high, const uint16_t* low, float* w, int64_t n);
  float (*scale_block)(const float* x, float* scaled, int64_t n, bool root, const StateCodes& codes);
  void (*unscale_block)(float* x, int64_t n, float scale, bool root);
  void (*gradient_stats)(const float* x, int64_t n, GradientStats* out);
  void (*stream_out)(void* to, const void* from, int64_t bytes);
  void (*end_stream)();
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The live table and why it was chosen. FEWBITS_ISA = scalar | avx2 | avx512 forces one.
struct Choice {
  const Kernels* kernels;
  const char* reason;
};
const Choice& chosen();

}  // namespace fewbits
