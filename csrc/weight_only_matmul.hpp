// weight_only_linear: x [M, K] float32, weights [N, K] of 4 or 8 bits in panels with a scale per group -> out [M, N],
//   out[m][n] = Σ_g (Σ_{k in g} x[m][k] · value(w[n][k])) · scale[n][g] + bias[n], in float32.
//
// Codes become numbers in registers. Sums run in an order that differs by instruction set: the result is within a few
// eps of Σ |x · w|, see fewbits/kernels/grouped.py.
//
//   tile: [features][rows] of x, or of x / token_scale, rounded to e4m3fn
//
// The ladder
//   1  one lane at a time
//   2  AVX2: 4 rows × 16 channels; a table of 16 values in two registers
//   3  AVX-512: 12 rows × 32 channels in 24 registers; a table of 16 values is one register and one permutation
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <limits>

#include "decoder.hpp"
#include "lanes.hpp"
#include "panel_block.hpp"

namespace {

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

// Floats [K] into row `row` of the tiles.
void put_float_row(const float* x, const fewbits::Tokens& tokens, int64_t row) {
  const int64_t index = row / kPanelRows, rows = tokens.rows_of(index);
  float* tile = reinterpret_cast<float*>(tokens.tile(index)) + row % kPanelRows;
  for (int64_t k = 0; k < tokens.K; ++k) tile[k * rows] = x[k];
  for (int64_t k = tokens.K; k < tokens.features(); ++k) tile[k * rows] = 0;
}

// Of one panel, some rows: see panel_tile.
template <class Decoded>
struct FloatSums {
  template <int Rows>
  __attribute__((noinline)) static void run(const PanelBlock& block) {
    constexpr int kParts = Rows <= kRowsFromMemory ? 2 : 1;  // sums that do not wait for each other
    const Decoded decoded(block.table);
    const uint8_t* words = block.words;
    const float* tile = reinterpret_cast<const float*>(block.tile);
    const char* scales = block.scales;
    Totals<Rows> totals(block);
    for (int64_t g = 0; g < block.weight.G; ++g, scales += block.scale_bytes()) {
      Floats sums[kParts][Rows][kBlockVectors];
#pragma GCC unroll 12
      for (int part = 0; part < kParts; ++part)
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
          for (int v = 0; v < kBlockVectors; ++v) sums[part][r][v] = same_float(0);
      if constexpr (Rows <= kRowsFromMemory) prefetch(scales + 4 * block.scale_bytes());
      for (int64_t s = 0; s < block.weight.words; ++s, words += kPanelStep) {
        Words codes[kBlockVectors];
#pragma GCC unroll 12
        for (int v = 0; v < kBlockVectors; ++v) {
          const uint8_t* at = words + v * kVectorWords * fewbits::kWordBytes;
          PanelBlock::read_ahead<Rows>(at);
          codes[v] = load_words(at);
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
        [&]<int... I>(std::integer_sequence<int, I...>) {
          (feature.template operator()<I>(), ...);
        }(std::make_integer_sequence<int, Decoded::kOfWord>());
      }
#pragma GCC unroll 12
      for (int v = 0; v < kBlockVectors; ++v) {
        const Floats scale = load_scales(scales, block.weight.bf16_scales, block.first + v * kVectorWords);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
          const Floats sum = kParts > 1 ? add(sums[0][r][v], sums[kParts - 1][r][v]) : sums[0][r][v];
          totals.put(r, v, multiply_add(sum, scale, totals.get(r, v)));
        }
      }
    }
    totals.finish();
  }
};

}  // namespace
