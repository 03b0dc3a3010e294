// The ops on weights in panels: the work of one call, split over threads.
#include <memory>

#include "drive.hpp"
#include "parallel.hpp"

namespace fewbits {

void int4_linear(const float* x, const PanelWeight& weight, const float* bias, float* out, int64_t M, int threads) {
  const Kernels& kernels = *chosen().kernels;
  const int64_t K = weight.features();
  const std::unique_ptr<int8_t[]> codes(new int8_t[static_cast<size_t>(2 * M * K)]);
  const std::unique_ptr<float[]> scales(new float[static_cast<size_t>(M)]);
  const std::unique_ptr<int32_t[]> sums(new int32_t[static_cast<size_t>(M * weight.G)]);
  const Int4Matmul job{weight, codes.get(), scales.get(), bias, out, {M}, codes.get() + M * K, sums.get()};
  const int for_rows = useful_threads(M * K, threads);
  parallel_ranges(for_rows, M, [&](int64_t begin, int64_t end) {
    kernels.quantize_per_token(x, K, begin, end, codes.get(), scales.get());
  });
  parallel_ranges(for_rows, job.rows.count(),
                  [&](int64_t begin, int64_t end) { kernels.int4_pack_rows(job, begin, end); });
  parallel_ranges(useful_threads(M * weight.N * K, threads), weight.panels() * job.rows.count(),
                  [&](int64_t begin, int64_t end) { kernels.int4_matmul(job, begin, end); });
}

void weight_only_linear(WeightOnlyMatmul job, int threads) {
  const Kernels& kernels = *chosen().kernels;
  const int64_t M = job.rows.M, features = job.weight.features();
  const std::unique_ptr<float[]> scratch(
      new float[static_cast<size_t>(M * (features + (job.e4m3_tokens ? job.K + 1 : 0)))]);
  job.tiles = scratch.get();
  if (job.e4m3_tokens) {
    job.rounded = job.tiles + M * features;
    job.token_scales = job.rounded + M * job.K;
  }
  parallel_ranges(useful_threads(M * job.K, threads), job.rows.count(),
                  [&](int64_t begin, int64_t end) { kernels.weight_only_pack_rows(job, begin, end); });
  parallel_ranges(useful_threads(M * job.weight.N * job.K, threads), job.weight.panels() * job.rows.count(),
                  [&](int64_t begin, int64_t end) { kernels.weight_only_matmul(job, begin, end); });
}

}  // namespace fewbits
