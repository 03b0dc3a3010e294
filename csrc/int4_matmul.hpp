// int4_linear: codes [M, K] int8, weights [N, K] int4 in panels with a scale per group -> out [M, N] float32,
//   out[m][n] = (Σ_g (Σ_{k in g} codes[m][k] · w[n][k]) · scale[n][g]) · token_scale[m] + bias[n].
//
// The inner sums are exact in int32; the outer one runs in float32 over ascending groups from 0, a product and an
// addition rounded each, so every version gives the same bits.
//
// The instruction takes unsigned by signed bytes. Here the weight is the unsigned one, u = w + 8, which is the nibble
// with its upper bit flipped: Σ code · w = Σ code · u − 8 · Σ code, and the last sum belongs to the row, not the
// weight. A word holds features 0 … 7 as nibbles; its low halves are features 0 2 4 6 as bytes, its upper halves 1 3 5
// 7, which is how the row tiles lie:
//
//   tile: [words of a panel][rows][8 bytes], each 8: features 0 2 4 6 1 3 5 7 of the word
//   sums: [G][rows], −8 · Σ code of the group
//
// The ladder
//   1  one lane at a time
//   2  AVX2: vpmaddubsw does not saturate on nibbles; 4 rows × 16 channels in registers
//   3  AVX-512 VNNI: 12 rows × 32 channels in 24 registers, two vectors of nibbles unpacked beside them: three
//      instructions for 24 products. Unpacking a panel to bytes first would save them, and cost more than they do
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include "decoder.hpp"
#include "lanes.hpp"
#include "panel_block.hpp"

namespace {

// Bytes 0 2 4 6 of a word of 8 in the lower half, 1 3 5 7 in the upper one.
inline uint64_t evens_then_odds(uint64_t bytes) {
  const auto gathered = [](uint64_t spread) {  // bytes 0 2 4 6 of 8 -> bytes 0 1 2 3
    spread &= 0x00FF00FF00FF00FF;
    spread = (spread | spread >> 8) & 0x0000FFFF0000FFFF;
    return (spread | spread >> 16) & 0xFFFFFFFF;
  };
  return gathered(bytes) | gathered(bytes >> 8) << 32;
}

// Codes [K] into row `row` of the tiles, and the sums of their groups.
void put_int4_row(const int8_t* codes, const fewbits::Tokens& tokens, int64_t row) {
  const int64_t index = row / kPanelRows, rows = tokens.rows_of(index), r = row % kPanelRows;
  const int64_t groups = tokens.needs.groups, group = tokens.K / groups;
  uint8_t* tile = tokens.tile(index) + r * 8;
  for (int64_t word = 0; word < tokens.K / 8; ++word) {
    uint64_t bytes;
    std::memcpy(&bytes, codes + word * 8, 8);
    bytes = evens_then_odds(bytes);
    std::memcpy(tile + word * rows * 8, &bytes, 8);
  }
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sum = 0;
    for (int64_t k = 0; k < group; ++k) sum += codes[g * group + k];
    tokens.tile_sums(index)[g * rows + r] = -8 * sum;
  }
}

// Of one panel, some rows: see panel_tile.
struct Int4Sums {
  template <int Rows>
  __attribute__((noinline)) static void run(const PanelBlock& block) {
    constexpr int kParts = Rows <= kRowsFromMemory ? 2 : 1;  // sums that do not wait for each other
    const Words low_half = same_word(0x0F0F0F0F), upper_bits = same_word(0x08080808);
    const uint8_t *words = block.words, *tile = block.tile;
    const char* scales = block.scales;
    Totals<Rows> totals(block);
    for (int64_t g = 0; g < block.weight.G; ++g, scales += block.scale_bytes()) {
      Words sums[kParts][Rows][kBlockVectors];
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
        for (int v = 0; v < kBlockVectors; ++v) {
          sums[0][r][v] = same_word(block.sums[g * block.stride + r]);
          if constexpr (kParts > 1) sums[kParts - 1][r][v] = same_word(0);
        }
      if constexpr (Rows <= kRowsFromMemory) prefetch(scales + 4 * block.scale_bytes());
      for (int64_t s = 0; s < block.weight.words; ++s, words += kPanelStep, tile += block.stride * 8) {
        Words nibbles[kBlockVectors], bytes[kBlockVectors];
#pragma GCC unroll 12
        for (int v = 0; v < kBlockVectors; ++v) {
          const uint8_t* at = words + v * kVectorWords * fewbits::kWordBytes;
          PanelBlock::read_ahead<Rows>(at);
          nibbles[v] = load_words(at);
          bytes[v] = masked_flipped(nibbles[v], low_half, upper_bits);
        }
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
          for (int v = 0; v < kBlockVectors; ++v) sums[0][r][v] = dot(sums[0][r][v], bytes[v], tile + r * 8);
#pragma GCC unroll 12
        for (int v = 0; v < kBlockVectors; ++v) bytes[v] = masked_flipped(down<4>(nibbles[v]), low_half, upper_bits);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
          for (int v = 0; v < kBlockVectors; ++v)
            sums[kParts - 1][r][v] = dot(sums[kParts - 1][r][v], bytes[v], tile + r * 8 + 4);
      }
#pragma GCC unroll 12
      for (int v = 0; v < kBlockVectors; ++v) {
        const Floats scale = load_scales(scales, block.weight.bf16_scales, block.first + v * kVectorWords);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
          const Words sum = kParts > 1 ? plus(sums[0][r][v], sums[kParts - 1][r][v]) : sums[0][r][v];
          totals.put(r, v, add(totals.get(r, v), multiply(to_floats(sum), scale)));
        }
      }
    }
    totals.finish();
  }
};

}  // namespace
