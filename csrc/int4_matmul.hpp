// int4_matmul: codes [M, K] int8, weights [N, K] int4 in panels with a scale per group -> out [M, N] float32,
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

#include "kernels.hpp"
#include "lanes.hpp"

namespace {

using fewbits::Int4Matmul;
using fewbits::kPanelChannels;
using fewbits::kPanelRows;
using fewbits::kPanelStep;
using fewbits::PanelWeight;

// Bytes 0 2 4 6 of a word of 8 in the lower half, 1 3 5 7 in the upper one.
inline uint64_t evens_then_odds(uint64_t bytes) {
  const auto gathered = [](uint64_t spread) {  // bytes 0 2 4 6 of 8 -> bytes 0 1 2 3
    spread &= 0x00FF00FF00FF00FF;
    spread = (spread | spread >> 8) & 0x0000FFFF0000FFFF;
    return (spread | spread >> 16) & 0xFFFFFFFF;
  };
  return gathered(bytes) | gathered(bytes >> 8) << 32;
}

void int4_pack_rows(const Int4Matmul& job, int64_t begin, int64_t end) {
  const PanelWeight& weight = job.weight;
  const int64_t K = weight.features(), group = weight.features_of_group();
  for (int64_t index = begin; index < end; ++index) {
    const int64_t rows = job.rows.rows_of(index);
    for (int64_t r = 0; r < rows; ++r) {
      const int8_t* row = job.codes + (index * kPanelRows + r) * K;
      int8_t* tile = job.tile(index) + r * 8;
      for (int64_t word = 0; word < K / 8; ++word) {
        uint64_t bytes;
        std::memcpy(&bytes, row + word * 8, 8);
        bytes = evens_then_odds(bytes);
        std::memcpy(tile + word * rows * 8, &bytes, 8);
      }
      for (int64_t g = 0; g < weight.G; ++g) {
        int32_t sum = 0;
        for (int64_t k = 0; k < group; ++k) sum += row[g * group + k];
        job.tile_sums(index)[g * rows + r] = -8 * sum;
      }
    }
  }
}

// What one block of sums reads and writes: `first` is its first channel in the panel, `stride` the rows of the tile.
struct Int4Block {
  const PanelWeight& weight;
  const uint8_t* panel;
  const void* scales;
  const int8_t* tile;
  const int32_t* sums;
  int64_t stride, first;
  float* totals;  // [rows][kPanelChannels]
};

template <int Rows>
void int4_block(const Int4Block& block) {
  constexpr int64_t kAhead = 2048;  // bytes: with few rows the panel comes from memory, at the pace of the prefetcher
  const PanelWeight& weight = block.weight;
  const Words low_half = same_word(0x0F0F0F0F), upper_bits = same_word(0x08080808);
  const int64_t scale_bytes = kPanelChannels * (weight.bf16_scales ? 2 : 4);
  const uint8_t* words = block.panel + block.first * fewbits::kWordBytes;
  const int8_t* tile = block.tile;
  const char* scales = static_cast<const char*>(block.scales);
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
    for (int v = 0; v < kBlockVectors; ++v)
      store_floats(block.totals + r * kPanelChannels + block.first + v * kVectorWords, same_float(0));
  for (int64_t g = 0; g < weight.G; ++g, scales += scale_bytes) {
    Words sums[Rows][kBlockVectors];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < kBlockVectors; ++v) sums[r][v] = same_word(block.sums[g * block.stride + r]);
    if constexpr (Rows <= 2) prefetch(scales + 4 * scale_bytes);
    for (int64_t s = 0; s < weight.words; ++s, words += kPanelStep, tile += block.stride * 8) {
      Words nibbles[kBlockVectors];
#pragma GCC unroll 12
      for (int v = 0; v < kBlockVectors; ++v) {
        if constexpr (Rows <= 2) prefetch(words + kAhead + v * kVectorWords * fewbits::kWordBytes);
        nibbles[v] = load_words(words + v * kVectorWords * fewbits::kWordBytes);
      }
      Words bytes[kBlockVectors];
#pragma GCC unroll 12
      for (int v = 0; v < kBlockVectors; ++v) bytes[v] = masked_flipped(nibbles[v], low_half, upper_bits);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
        for (int v = 0; v < kBlockVectors; ++v) sums[r][v] = dot(sums[r][v], bytes[v], tile + r * 8);
#pragma GCC unroll 12
      for (int v = 0; v < kBlockVectors; ++v) bytes[v] = masked_flipped(down<4>(nibbles[v]), low_half, upper_bits);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
        for (int v = 0; v < kBlockVectors; ++v) sums[r][v] = dot(sums[r][v], bytes[v], tile + r * 8 + 4);
    }
#pragma GCC unroll 12
    for (int v = 0; v < kBlockVectors; ++v) {
      const Floats scale = load_scales(scales, weight.bf16_scales, block.first + v * kVectorWords);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        float* total = block.totals + r * kPanelChannels + block.first + v * kVectorWords;
        store_floats(total, add(load_floats(total), multiply(to_floats(sums[r][v]), scale)));
      }
    }
  }
}

void int4_rows(const Int4Block& block, int64_t rows) {
  using Run = void (*)(const Int4Block&);
#if defined(__AVX512VNNI__)
  static constexpr Run kRun[kBlockRows] = {int4_block<1>, int4_block<2>,  int4_block<3>,  int4_block<4>,
                                           int4_block<5>, int4_block<6>,  int4_block<7>,  int4_block<8>,
                                           int4_block<9>, int4_block<10>, int4_block<11>, int4_block<12>};
#elif defined(__AVX2__)
  static constexpr Run kRun[kBlockRows] = {int4_block<1>, int4_block<2>, int4_block<3>, int4_block<4>};
#else
  static constexpr Run kRun[kBlockRows] = {int4_block<1>};
#endif
  kRun[rows - 1](block);
}

void int4_matmul(const Int4Matmul& job, int64_t begin, int64_t end) {
  alignas(64) float totals[kPanelRows * kPanelChannels];
  const PanelWeight& weight = job.weight;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t panel = index / job.rows.count(), tile = index % job.rows.count();
    const int64_t rows = job.rows.rows_of(tile), first = panel * kPanelChannels;
    for (int64_t from = 0; from < kPanelChannels; from += kVectorWords * kBlockVectors) {
      for (int64_t r = 0; r < rows; r += kBlockRows) {
        const Int4Block block{weight,
                              weight.panel(panel),
                              weight.scales_of(panel),
                              job.tile(tile) + r * 8,
                              job.tile_sums(tile) + r,
                              rows,
                              from,
                              totals + r * kPanelChannels};
        int4_rows(block, rows - r < kBlockRows ? rows - r : kBlockRows);
      }
    }
    const int64_t channels = weight.N - first < kPanelChannels ? weight.N - first : kPanelChannels;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = tile * kPanelRows + r;
      float* out = job.out + m * weight.N + first;
      for (int64_t n = 0; n < channels; ++n) out[n] = totals[r * kPanelChannels + n] * job.token_scales[m];
      if (job.bias)
        for (int64_t n = 0; n < channels; ++n) out[n] += job.bias[first + n];
    }
  }
}

}  // namespace
