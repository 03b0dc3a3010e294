#include "drive.hpp"

#include <memory>

#include "parallel.hpp"

namespace fewbits {
namespace {

// Below this many multiply-adds (or bytes moved) waking a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 15;

int useful_threads(int64_t work, int threads) {
  const int64_t most = work / kWorthAThread;
  return most < threads ? static_cast<int>(most < 1 ? 1 : most) : threads;
}

}  // namespace

void quantize_per_token(const float* x, int64_t M, int64_t K, int8_t* codes, float* scales, int threads) {
  parallel_ranges(useful_threads(M * K, threads), M, [&](int64_t begin, int64_t end) {
    chosen().kernels->quantize_per_token(x, K, begin, end, codes, scales);
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

}  // namespace fewbits
