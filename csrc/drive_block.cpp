// Block formats of whole tensors x [M, K]: blocks lie along K, the last one of a row may be short.
#include <algorithm>
#include <bit>
#include <vector>

#include "drive.hpp"
#include "parallel.hpp"

namespace fewbits {
namespace {

constexpr int64_t kRun = 2048;  // elements of a run; a multiple of every block size
constexpr int64_t kRunsWorthAThread = 16;

// Calls work(x, count, codes, scales) for runs of whole blocks. Rows of whole blocks are one long row.
template <class Work>
void in_runs(const float* x, int64_t M, int64_t K, int64_t size, uint8_t* codes, uint8_t* scales, int threads,
             const Work& work) {
  if (K % size == 0) K *= M, M = 1;
  const int64_t runs_of_row = ceil_div(K, kRun), runs = M * runs_of_row, scales_of_row = ceil_div(K, size);
  const int useful = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, runs / kRunsWorthAThread)));
  parallel_ranges(useful, runs, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t row = run / runs_of_row, at = run % runs_of_row * kRun;
      work(x + row * K + at, std::min(kRun, K - at), codes + row * K + at, scales + row * scales_of_row + at / size);
    }
  });
}

// The bits of the first float32 beyond t, which a double holds; t itself counts where the code after it is even.
int32_t first_past(double t, bool upper_is_even) {
  const float near = static_cast<float>(t);
  const double rounded = near;
  return std::bit_cast<int32_t>(near) + (rounded > t || (rounded == t && upper_is_even) ? 0 : 1);
}

void fill_boundaries(Nvfp4Format& format) {
  uint8_t codes[128];
  float scales[128];
  for (int code = 0; code < 128; ++code) codes[code] = static_cast<uint8_t>(code);
  chosen().kernels->decode_codes(codes, 128, scales, format.scale);
  for (int code = 0; code < 128; ++code) {
    const double product = static_cast<double>(scales[code]) * format.tensor_scale;
    const double divisor = product > 0 ? product : 1;
    for (int b = 0; b < 7; ++b) format.boundaries[code][b] = first_past(format.bounds[b] * divisor, b % 2 == 1);
  }
}

}  // namespace

void mx_encode(const float* x, int64_t M, int64_t K, const MxFormat& format, uint8_t* codes, uint8_t* scales,
               int threads) {
  in_runs(x, M, K, format.size, codes, scales, threads,
          [&](const float* from, int64_t count, uint8_t* to, uint8_t* scale) {
            chosen().kernels->mx_encode(from, count, format, to, scale);
          });
}

void nvfp4_encode(const float* x, int64_t M, int64_t K, Nvfp4Format format, uint8_t* codes, uint8_t* scales,
                  int threads) {
  fill_boundaries(format);
  in_runs(x, M, K, format.size, codes, scales, threads,
          [&](const float* from, int64_t count, uint8_t* to, uint8_t* scale) {
            chosen().kernels->nvfp4_encode(from, count, format, to, scale);
          });
}

float finite_amax(const float* x, int64_t count, int threads) {
  const int64_t runs = ceil_div(count, kRun);
  std::vector<float> largest(static_cast<size_t>(runs));
  const int useful = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, runs / kRunsWorthAThread)));
  parallel_ranges(useful, runs, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run)
      largest[run] = chosen().kernels->finite_amax(x + run * kRun, std::min(kRun, count - run * kRun));
  });
  return runs ? *std::max_element(largest.begin(), largest.end()) : 0.0f;
}

}  // namespace fewbits
