#include "drive.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "parallel.hpp"
#include "room.hpp"

namespace fewbits {
namespace {

// Below this many multiply-adds (or bytes moved) waking a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 15;

}  // namespace

int useful_threads(int64_t work, int threads) {
  const int64_t most = work / kWorthAThread;
  return most < threads ? static_cast<int>(most < 1 ? 1 : most) : threads;
}

void quantize_per_token(const float* x, int64_t M, int64_t K, int8_t* codes, float* scales, int threads) {
  parallel_ranges(useful_threads(M * K, threads), M, [&](int64_t begin, int64_t end) {
    chosen().kernels->quantize_per_token(x, K, begin, end, codes, scales);
  });
}

void rotate(const float* x, int64_t M, int64_t K, int64_t block, float* out, int threads) {
  parallel_ranges(useful_threads(M * K, threads), M, [&](int64_t begin, int64_t end) {
    chosen().kernels->rotate(x + begin * K, (end - begin) * K, block, out + begin * K);
  });
}

bool quantize_weight(const WeightJob& job, int threads) {
  std::atomic<bool> bad{false};
  parallel_ranges(useful_threads(job.N * job.K, threads), job.N, [&](int64_t begin, int64_t end) {
    if (chosen().kernels->quantize_weight(job, begin, end)) bad = true;
  });
  return bad;
}

void pack_int8(const int8_t* weight, int64_t N, int64_t K, int8_t* packed, int threads) {
  const int64_t steps = ceil_div(K, kGroup), panel_bytes = kHeaderBytes + steps * kStepBytes;
  parallel_ranges(useful_threads(N * K, threads), ceil_div(N, kChannels), [&](int64_t begin, int64_t end) {
    constexpr int64_t kBlock = 64;
    int8_t lines[kChannels * kBlock];
    for (int64_t index = begin; index < end; ++index) {
      int8_t* panel = packed + index * panel_bytes;
      std::memset(panel, 0, static_cast<size_t>(panel_bytes));
      const int64_t first = index * kChannels, channels = std::min(kChannels, N - first);
      for (int64_t k = 0; k < K; k += kBlock) {  // a cache line of each channel, then the steps that they make
        const int64_t present = std::min(kBlock, K - k);
        for (int64_t n = 0; n < channels; ++n) {
          const int8_t* from = weight + (first + n) * K + k;
          if (present == kBlock) {
            std::memcpy(lines + n * kBlock, from, kBlock);
          } else {
            std::memset(lines + n * kBlock, 0, kBlock);
            std::memcpy(lines + n * kBlock, from, static_cast<size_t>(present));
          }
        }
        int8_t* to = panel + kHeaderBytes + k / kGroup * kStepBytes;
        for (int64_t s = 0; s < present; s += kGroup, to += kStepBytes) {
          for (int64_t n = 0; n < channels; ++n) std::memcpy(to + n * kGroup, lines + n * kBlock + s, kGroup);
        }
      }
      for (int64_t n = 0; n < channels; ++n) {
        const int8_t* row = weight + (first + n) * K;
        int32_t sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += row[k];
        sum *= 128;
        std::memcpy(panel + n * static_cast<int64_t>(sizeof sum), &sum, sizeof sum);
      }
    }
  });
}

void int8_matmul(Int8Matmul job, int threads) {
  const Kernels& kernels = *chosen().kernels;
  const std::unique_ptr<uint8_t[]> tiles(new uint8_t[static_cast<size_t>(job.tile_bytes())]);
  job.tiles = tiles.get();
  parallel_ranges(useful_threads(job.tile_bytes(), threads), job.row_tiles(),
                  [&](int64_t begin, int64_t end) { kernels.int8_pack_rows(job, begin, end); });
  parallel_ranges(useful_threads(job.M * job.N * job.K, threads), job.panels() * job.row_tiles(),
                  [&](int64_t begin, int64_t end) { kernels.int8_matmul(job, begin, end); });
}

void int8_linear(const float* x, const int8_t* packed, const float* channel_scales, const float* bias, float* out,
                 int64_t M, int64_t N, int64_t K, int threads) {
  const std::unique_ptr<int8_t[]> codes(new int8_t[static_cast<size_t>(M * K)]);
  const std::unique_ptr<float[]> scales(new float[static_cast<size_t>(M)]);
  quantize_per_token(x, M, K, codes.get(), scales.get(), threads);
  int8_matmul({codes.get(), scales.get(), packed, channel_scales, bias, out, M, N, K, nullptr}, threads);
}

void int8_linear_two_digits(const float* x, const int8_t* packed, const float* channel_scales, const float* bias,
                            float* out, int64_t M, int64_t N, int64_t K, int threads) {
  const Kernels& kernels = *chosen().kernels;
  const Weight weight{.needs = {TokenKind::kInt8, 1, 0},
                      .panels = {reinterpret_cast<const uint8_t*>(packed), channel_scales, false, N, 1, 0},
                      .how = Codes::kInt8,
                      .table = nullptr,
                      .bias = bias,
                      .K = K};
  Linear job{{}, &weight, 1, out, N, nullptr, false};
  Room room;
  const auto lay_out = [&] { job.tokens[0] = take_tokens(room, weight.needs, 2 * M, K); };
  lay_out();
  room.allocate();
  lay_out();
  parallel_ranges(useful_threads(M * K, threads), M, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(2 * K + 16)]);
    kernels.make_digits(x, job.tokens[0], scratch.get(), begin, end);
  });
  parallel_ranges(useful_threads(2 * M * N * K, threads), job.units(),
                  [&](int64_t begin, int64_t end) { kernels.linear_digits(job, begin, end); });
}

}  // namespace fewbits
