// int8_matmul: codes [M, K] int8, packed weights [N, K] int8 -> out [M, N] float32,
//   out[m][n] = (Σ_k codes[m][k] · w[n][k]) · token_scale[m] · channel_scale[n] + bias[n], the sum in int32.
//
// All versions multiply unsigned by signed bytes, since VNNI does: u = code + 128, so
//   Σ code · w = Σ u · w − 128 · Σ w, and the packed panel carries 128 · Σ w. Exact modulo 2^32.
//
// The ladder
//   1  scalar: 32 channels × 4 features a step, the order of the packed bytes
//   2  AVX2: bytes widened to 16 bits, madd, 2 rows × 16 channels in registers. No vpmaddubsw: its 16-bit sums saturate
//   3  AVX-512 VNNI: vpdpbusd, 12 rows × 32 channels in 24 registers; a panel stays in L2 while all rows pass by it
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.hpp"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using fewbits::ceil_div;
using fewbits::Int8Matmul;
using fewbits::kChannels;
using fewbits::kGroup;
using fewbits::kHeaderBytes;
using fewbits::kStepBytes;
using fewbits::kTileRows;

// Row tile: [steps][rows][4] unsigned bytes, code + 128; features beyond K hold 128 against weights of 0.
void int8_pack_rows(const Int8Matmul& job, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t rows = job.rows_of(index);
    uint8_t* tile = job.tile(index);
    for (int64_t r = 0; r < rows; ++r) {
      const int8_t* row = job.codes + (index * kTileRows + r) * job.K;
      const int64_t whole = job.K / kGroup;
      for (int64_t s = 0; s < whole; ++s) {
        uint32_t four;
        std::memcpy(&four, row + s * kGroup, kGroup);
        four ^= 0x80808080u;
        std::memcpy(tile + (s * rows + r) * kGroup, &four, kGroup);
      }
      if (whole < job.steps()) {
        uint32_t four = 0;
        std::memcpy(&four, row + whole * kGroup, static_cast<size_t>(job.K - whole * kGroup));
        four ^= 0x80808080u;
        std::memcpy(tile + (whole * rows + r) * kGroup, &four, kGroup);
      }
    }
  }
}

#if defined(__AVX512VNNI__)

template <int Rows>
void sums_of_tile(const uint8_t* tile, const int8_t* panel, int64_t steps, int32_t* sums) {
  constexpr int64_t kAhead = 2048;  // bytes: with one row the panel comes from memory, at the pace of the prefetcher
  const __m512i zero = _mm512_setzero_si512();
  const __m512i start0 = _mm512_sub_epi32(zero, _mm512_loadu_si512(panel));
  const __m512i start1 = _mm512_sub_epi32(zero, _mm512_loadu_si512(panel + 64));
  __m512i sum0[Rows], sum1[Rows];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    sum0[r] = start0;
    sum1[r] = start1;
  }
  const int8_t* weights = panel + kHeaderBytes;
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (Rows <= 2) {
      _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(weights + kAhead + 64), _MM_HINT_T0);
    }
    const __m512i w0 = _mm512_loadu_si512(weights);
    const __m512i w1 = _mm512_loadu_si512(weights + 64);
    weights += kStepBytes;
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      std::memcpy(&four, tile + (s * Rows + r) * kGroup, kGroup);
      const __m512i a = _mm512_set1_epi32(four);
      sum0[r] = _mm512_dpbusd_epi32(sum0[r], a, w0);
      sum1[r] = _mm512_dpbusd_epi32(sum1[r], a, w1);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    _mm512_storeu_si512(sums + r * kChannels, sum0[r]);
    _mm512_storeu_si512(sums + r * kChannels + 16, sum1[r]);
  }
}

void sums_of_rows(const uint8_t* tile, const int8_t* panel, int64_t steps, int64_t rows, int32_t* sums) {
  switch (rows) {
    case 1:
      return sums_of_tile<1>(tile, panel, steps, sums);
    case 2:
      return sums_of_tile<2>(tile, panel, steps, sums);
    case 3:
      return sums_of_tile<3>(tile, panel, steps, sums);
    case 4:
      return sums_of_tile<4>(tile, panel, steps, sums);
    case 5:
      return sums_of_tile<5>(tile, panel, steps, sums);
    case 6:
      return sums_of_tile<6>(tile, panel, steps, sums);
    case 7:
      return sums_of_tile<7>(tile, panel, steps, sums);
    case 8:
      return sums_of_tile<8>(tile, panel, steps, sums);
    case 9:
      return sums_of_tile<9>(tile, panel, steps, sums);
    case 10:
      return sums_of_tile<10>(tile, panel, steps, sums);
    case 11:
      return sums_of_tile<11>(tile, panel, steps, sums);
    case 12:
      return sums_of_tile<12>(tile, panel, steps, sums);
  }
}

#elif defined(__AVX2__)

// Rows ∈ {1, 2} rows from `row` on, 16 channels: a vector of 8 sums holds 4 channels × 2 pairs of features.
template <int Rows>
void sums_of_half(const uint8_t* tile, const int8_t* half, int64_t steps, int64_t rows, int64_t row, int32_t* sums) {
  __m256i pairs[Rows][4];
  for (auto& of_row : pairs)
    for (auto& vector : of_row) vector = _mm256_setzero_si256();
  for (int64_t s = 0; s < steps; ++s) {
    __m256i a[Rows];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      std::memcpy(&four, tile + (s * rows + row + r) * kGroup, kGroup);
      a[r] = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
    }
    for (int q = 0; q < 4; ++q) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + s * kStepBytes + q * 16));
      const __m256i w = _mm256_cvtepi8_epi16(bytes);
      for (int r = 0; r < Rows; ++r) pairs[r][q] = _mm256_add_epi32(pairs[r][q], _mm256_madd_epi16(a[r], w));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    for (int q = 0; q < 4; q += 2) {
      // hadd works within 128-bit lanes: channels 0 1 4 5 | 2 3 6 7, which the permutation puts in order
      const __m256i added = _mm256_hadd_epi32(pairs[r][q], pairs[r][q + 1]);
      __m256i* to = reinterpret_cast<__m256i*>(sums + (row + r) * kChannels + q * 4);
      _mm256_storeu_si256(to, _mm256_permute4x64_epi64(added, 0xD8));
    }
  }
}

void sums_of_rows(const uint8_t* tile, const int8_t* panel, int64_t steps, int64_t rows, int32_t* sums) {
  const int8_t* weights = panel + kHeaderBytes;
  for (int64_t half = 0; half < kChannels; half += 16) {
    int64_t row = 0;
    for (; row + 1 < rows; row += 2) sums_of_half<2>(tile, weights + half * kGroup, steps, rows, row, sums + half);
    if (row < rows) sums_of_half<1>(tile, weights + half * kGroup, steps, rows, row, sums + half);
  }
  int32_t starts[kChannels];
  std::memcpy(starts, panel, sizeof starts);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < kChannels; ++n) sums[r * kChannels + n] -= starts[n];
}

#else

void sums_of_rows(const uint8_t* tile, const int8_t* panel, int64_t steps, int64_t rows, int32_t* sums) {
  int32_t starts[kChannels];
  std::memcpy(starts, panel, sizeof starts);
  for (int64_t r = 0; r < rows; ++r) {
    int32_t* of_row = sums + r * kChannels;
    for (int64_t n = 0; n < kChannels; ++n) of_row[n] = -starts[n];
    for (int64_t s = 0; s < steps; ++s) {
      const uint8_t* a = tile + (s * rows + r) * kGroup;
      const int8_t* w = panel + kHeaderBytes + s * kStepBytes;
      for (int64_t n = 0; n < kChannels; ++n)
        for (int64_t k = 0; k < kGroup; ++k) of_row[n] += int32_t{a[k]} * w[n * kGroup + k];
    }
  }
}

#endif

void int8_matmul(const Int8Matmul& job, int64_t begin, int64_t end) {
  alignas(64) int32_t sums[kTileRows * kChannels];
  const int64_t row_tiles = job.row_tiles();
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index / row_tiles * kChannels;
    const int64_t channels = job.N - first < kChannels ? job.N - first : kChannels;
    const int64_t tile = index % row_tiles;
    const int64_t rows = job.rows_of(tile);
    sums_of_rows(job.tile(tile), job.panel(index / row_tiles), job.steps(), rows, sums);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = tile * kTileRows + r;
      float* out = job.out + m * job.N + first;
      for (int64_t n = 0; n < channels; ++n)
        out[n] = static_cast<float>(sums[r * kChannels + n]) * job.token_scales[m] * job.channel_scales[first + n];
      if (job.bias)
        for (int64_t n = 0; n < channels; ++n) out[n] += job.bias[first + n];
    }
  }
}

}  // namespace
