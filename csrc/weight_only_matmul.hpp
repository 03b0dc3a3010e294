// weight_only_matmul: x [M, K] float32, weights [N, K] of 4 or 8 bits in panels with a scale per group -> out [M, N],
//   out[m][n] = Σ_g (Σ_{k in g} x[m][k] · value(w[n][k])) · scale[n][g] + bias[n], in float32.
//
// Codes become numbers in registers. Sums run in an order that differs by instruction set: the result is within a few
// eps of Σ |x · w|, see fewbits/kernels/grouped.py.
//
//   tile: [features][rows] of x, or with e4m3_tokens of x / token_scale, rounded to e4m3fn
//
// The ladder
//   1  one lane at a time
//   2  AVX2: 4 rows × 16 channels; a table of 16 values in two registers
//   3  AVX-512: 12 rows × 32 channels in 24 registers; a table of 16 values is one register and one permutation
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <limits>

#include "kernels.hpp"
#include "lanes.hpp"

namespace {

using fewbits::Codes;
using fewbits::WeightOnlyMatmul;

// The number that code I of each word stands for.
struct TableCodes {
  static constexpr int kOfWord = 8;
  explicit TableCodes(const float* values) : table(values) {}
  template <int I>
  Floats value(Words words) const {
    return table[down<4 * I>(words)];
  }
  Table16 table;
};

struct Int8Codes {
  static constexpr int kOfWord = 4;
  explicit Int8Codes(const float*) {}
  template <int I>
  Floats value(Words words) const {
    return to_floats(down_signed<24>(up<24 - 8 * I>(words)));
  }
};

// e4m3fn to float32: | s | eeee | mmm | goes to the sign, the low 4 bits of the exponent and the high 3 of the
// fraction. Their bias is 7 and not 127, hence 2^120; subnormals come out right, since they are subnormal on the way
// too. The shift to the right fills bits 27 … 30 with signs, which the mask takes away.
struct E4m3Codes {
  static constexpr int kOfWord = 4;
  explicit E4m3Codes(const float*) {}
  template <int I>
  Floats value(Words words) const {
    const Words placed = both(down_signed<4>(up<24 - 8 * I>(words)), same_word(static_cast<int32_t>(0x87F00000)));
    return multiply(as_floats(placed), same_float(0x1p120f));
  }
};

// x / scale for scale = max|x| / 448, rounded to e4m3fn, halves to even; a row with NaN or Inf gets the scale NaN.
float e4m3_row(const float* x, int64_t K, float* rounded) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < K; ++k) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(x[k]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= 0x7F800000) {
    for (int64_t k = 0; k < K; ++k) rounded[k] = 0;
    return std::numeric_limits<float>::quiet_NaN();
  }
  constexpr float kTiny = std::numeric_limits<float>::min();
  const float wanted = std::bit_cast<float>(largest) / 448.0f, scale = wanted > kTiny ? wanted : kTiny;
  for (int64_t k = 0; k < K; ++k) {
    const float value = x[k] / scale;
    const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7FFFFFFF;
    // normal: round the upper 3 bits of the fraction; below 2^-6 the step is 2^-9, and 1.5 · 2^14 has the ulp 2^-9
    const uint32_t normal = (magnitude + 0x7FFFF + (magnitude >> 20 & 1)) & 0xFFF00000;
    const float small = (std::bit_cast<float>(magnitude) + 24576.0f) - 24576.0f;
    const uint32_t chosen = magnitude < 0x3C800000 ? std::bit_cast<uint32_t>(small) : normal;
    rounded[k] = std::bit_cast<float>(chosen | (bits & 0x80000000));
  }
  return scale;
}

void weight_only_pack_rows(const WeightOnlyMatmul& job, int64_t begin, int64_t end) {
  const int64_t features = job.weight.features();
  for (int64_t index = begin; index < end; ++index) {
    const int64_t rows = job.rows.rows_of(index);
    float* tile = job.tile(index);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = index * kPanelRows + r;
      const float* row = job.x + m * job.K;
      if (job.e4m3_tokens) {
        float* rounded = job.rounded + m * job.K;
        job.token_scales[m] = e4m3_row(row, job.K, rounded);
        row = rounded;
      }
      for (int64_t k = 0; k < job.K; ++k) tile[k * rows + r] = row[k];
      for (int64_t k = job.K; k < features; ++k) tile[k * rows + r] = 0;
    }
  }
}

struct FloatBlock {
  const PanelWeight& weight;
  const uint8_t* panel;
  const void* scales;
  const float* tile;
  const float* table;
  int64_t stride, first;
  float* totals;  // [rows][kPanelChannels]
};

template <int Rows, class Decoded>
void float_block(const FloatBlock& block) {
  constexpr int64_t kAhead = 2048;           // bytes, as in int4_block
  constexpr int kParts = Rows <= 2 ? 2 : 1;  // sums that do not wait for each other
  const PanelWeight& weight = block.weight;
  const Decoded decoded(block.table);
  const int64_t scale_bytes = kPanelChannels * (weight.bf16_scales ? 2 : 4);
  const uint8_t* words = block.panel + block.first * fewbits::kWordBytes;
  const float* tile = block.tile;
  const char* scales = static_cast<const char*>(block.scales);
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
    for (int v = 0; v < kBlockVectors; ++v)
      store_floats(block.totals + r * kPanelChannels + block.first + v * kVectorWords, same_float(0));
  for (int64_t g = 0; g < weight.G; ++g, scales += scale_bytes) {
    Floats sums[kParts][Rows][kBlockVectors];
#pragma GCC unroll 12
    for (int part = 0; part < kParts; ++part)
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
        for (int v = 0; v < kBlockVectors; ++v) sums[part][r][v] = same_float(0);
    if constexpr (Rows <= 2) prefetch(scales + 4 * scale_bytes);
    for (int64_t s = 0; s < weight.words; ++s, words += kPanelStep) {
      Words codes[kBlockVectors];
#pragma GCC unroll 12
      for (int v = 0; v < kBlockVectors; ++v) {
        if constexpr (Rows <= 2) prefetch(words + kAhead + v * kVectorWords * fewbits::kWordBytes);
        codes[v] = load_words(words + v * kVectorWords * fewbits::kWordBytes);
      }
      const auto feature = [&]<int I>() {
        Floats values[kBlockVectors];
#pragma GCC unroll 12
        for (int v = 0; v < kBlockVectors; ++v) values[v] = decoded.template value<I>(codes[v]);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
          const Floats x = same_float(tile[r]);
#pragma GCC unroll 12
          for (int v = 0; v < kBlockVectors; ++v)
            sums[I % kParts][r][v] = multiply_add(x, values[v], sums[I % kParts][r][v]);
        }
        tile += block.stride;
      };
      feature.template operator()<0>();
      feature.template operator()<1>();
      feature.template operator()<2>();
      feature.template operator()<3>();
      if constexpr (Decoded::kOfWord == 8) {
        feature.template operator()<4>();
        feature.template operator()<5>();
        feature.template operator()<6>();
        feature.template operator()<7>();
      }
    }
#pragma GCC unroll 12
    for (int v = 0; v < kBlockVectors; ++v) {
      const Floats scale = load_scales(scales, weight.bf16_scales, block.first + v * kVectorWords);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        Floats sum = sums[0][r][v];
#pragma GCC unroll 12
        for (int part = 1; part < kParts; ++part) sum = add(sum, sums[part][r][v]);
        float* total = block.totals + r * kPanelChannels + block.first + v * kVectorWords;
        store_floats(total, multiply_add(sum, scale, load_floats(total)));
      }
    }
  }
}

template <class Decoded>
void float_rows(const FloatBlock& block, int64_t rows) {
  using Run = void (*)(const FloatBlock&);
#if defined(__AVX512VNNI__)
  static constexpr Run kRun[kBlockRows] = {
      float_block<1, Decoded>, float_block<2, Decoded>,  float_block<3, Decoded>,  float_block<4, Decoded>,
      float_block<5, Decoded>, float_block<6, Decoded>,  float_block<7, Decoded>,  float_block<8, Decoded>,
      float_block<9, Decoded>, float_block<10, Decoded>, float_block<11, Decoded>, float_block<12, Decoded>};
#elif defined(__AVX2__)
  static constexpr Run kRun[kBlockRows] = {float_block<1, Decoded>, float_block<2, Decoded>, float_block<3, Decoded>,
                                           float_block<4, Decoded>};
#else
  static constexpr Run kRun[kBlockRows] = {float_block<1, Decoded>};
#endif
  kRun[rows - 1](block);
}

void weight_only_matmul(const WeightOnlyMatmul& job, int64_t begin, int64_t end) {
  alignas(64) float totals[kPanelRows * kPanelChannels];
  const PanelWeight& weight = job.weight;
  const auto run = job.how == Codes::kTable  ? float_rows<TableCodes>
                   : job.how == Codes::kInt8 ? float_rows<Int8Codes>
                                             : float_rows<E4m3Codes>;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t panel = index / job.rows.count(), tile = index % job.rows.count();
    const int64_t rows = job.rows.rows_of(tile), first = panel * kPanelChannels;
    for (int64_t from = 0; from < kPanelChannels; from += kVectorWords * kBlockVectors)
      for (int64_t r = 0; r < rows; r += kBlockRows)
        run({weight, weight.panel(panel), weight.scales_of(panel), job.tile(tile) + r, job.table, rows, from,
             totals + r * kPanelChannels},
            rows - r < kBlockRows ? rows - r : kBlockRows);
    const int64_t channels = weight.N - first < kPanelChannels ? weight.N - first : kPanelChannels;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = tile * kPanelRows + r;
      float* out = job.out + m * weight.N + first;
      const float scale = job.e4m3_tokens ? job.token_scales[m] : 1.0f;
      for (int64_t n = 0; n < channels; ++n) out[n] = totals[r * kPanelChannels + n] * scale;
      if (job.bias)
        for (int64_t n = 0; n < channels; ++n) out[n] += job.bias[first + n];
    }
  }
}

}  // namespace
