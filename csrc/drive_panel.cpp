// The op on weights in panels: the work of one call, split over threads.
#include "drive.hpp"
#include "parallel.hpp"
#include "room.hpp"

namespace fewbits {

void panel_linear(const float* x, const Weight& weight, float* out, int64_t M, int threads) {
  const Kernels& kernels = *chosen().kernels;
  const int64_t K = weight.K, N = weight.panels.N;
  Linear job{{}, &weight, 1, out, N, nullptr, false};
  Tokens& tokens = job.tokens[0];
  Room room;
  const auto lay_out = [&] { tokens = take_tokens(room, weight.needs, M, K); };
  lay_out();
  room.allocate();
  lay_out();
  parallel_ranges(useful_threads(M * K, threads), M, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(2 * K + 16)]);
    kernels.make_tokens({x, nullptr, 0}, tokens, scratch.get(), begin, end);
  });
  parallel_ranges(useful_threads(M * N * K, threads), job.units(),
                  [&](int64_t begin, int64_t end) { kernels.linear(job, begin, end); });
}

}  // namespace fewbits
