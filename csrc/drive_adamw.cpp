// The optimizer's sweep and the statistics of gradients: all parameters as one row of chunks, split over threads.
//
//   gradient  -> g |                                 | -> weight, low, copy
//   weight    -> w |  g · factor, AdamW              | -> m
//   m, v      -> m, v                                | -> v
//
// A chunk is read once, stays in the first cache while it passes through these steps, and is written once. float32
// arrays are worked on where they are.
#include <algorithm>
#include <atomic>
#include <memory>

#include "drive.hpp"
#include "parallel.hpp"

namespace fewbits {
namespace {

constexpr int64_t kChunk = 1024;       // elements: five buffers of 4 KiB
constexpr int64_t kStateBlock = 256;   // elements of 8-bit states that share a scale; divides kChunk
constexpr int64_t kStatsChunk = 4096;  // sums of squares are added chunk by chunk: part of their meaning
constexpr int64_t kChunksWorthAThread = 16;

template <class T>
T* at(int64_t address, int64_t element) {
  return reinterpret_cast<T*>(address) + element;
}

// Calls work(tensor, first, count, chunk) for all chunks of all tensors.
template <class Tensor, class Work>
void in_chunks(const Tensor* tensors, int64_t count, int64_t size, int threads, const Work& work) {
  const std::unique_ptr<int64_t[]> starts(new int64_t[static_cast<size_t>(count + 1)]);
  starts[0] = 0;
  for (int64_t t = 0; t < count; ++t) starts[t + 1] = starts[t] + ceil_div(tensors[t].count, size);
  const int64_t chunks = starts[count];
  const int useful = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, chunks / kChunksWorthAThread)));
  parallel_ranges(useful, chunks, [&](int64_t begin, int64_t end) {
    int64_t t = std::upper_bound(starts.get(), starts.get() + count + 1, begin) - starts.get() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= starts[t + 1]) ++t;
      const int64_t first = (chunk - starts[t]) * size;
      work(tensors[t], first, std::min(size, tensors[t].count - first), chunk);
    }
    chosen().kernels->end_stream();
  });
}

class Sweep {
 public:
  explicit Sweep(const AdamwFormats& formats)
      : formats_(formats), kernels_(*chosen().kernels), codes_(decoding_of(formats.codes_stochastic.codec)) {}

  void operator()(const AdamwTensor& t, const AdamwCoefficients& c, int64_t first, int64_t n) const {
    alignas(64) float g[kChunk], w[kChunk], m[kChunk], v[kChunk], change[kChunk];
    const float* gradient = floats(t.gradient, t.gradient_kind, first, n, g);
    float* weight = load_weight(t, first, n, w);
    float* m_now = load_moment(t.m, t.m_scales, t.state, first, n, false, m);
    float* v_now = load_moment(t.v, t.v_scales, t.state, first, n, true, v);
    kernels_.adamw(gradient, weight, m_now, v_now, t.master == kMasterKahan ? change : nullptr, n, c);
    store_moment(t.m, t.m_scales, t.state, first, n, false, m_now, t.m_key);
    store_moment(t.v, t.v_scales, t.state, first, n, true, v_now, t.v_key);
    store_weight(t, first, n, weight, change);
    if (t.copy) {
      alignas(64) uint16_t copy[kChunk];  // not read before the next forward pass: past the caches
      kernels_.encode_floats(weight, n, copy, t.copy_kind == kFloat16 ? formats_.fp16 : formats_.bf16, 0);
      kernels_.stream_out(at<uint16_t>(t.copy, first), copy, 2 * n);
    }
  }

  const float* floats(int64_t address, int64_t kind, int64_t first, int64_t n, float* buffer) const {
    if (kind == kFloat32) return at<const float>(address, first);
    const Rounder& format = kind == kFloat16 ? formats_.fp16 : formats_.bf16;
    kernels_.decode(at<const uint8_t>(address, 2 * first), false, n, buffer, {format.codec, {}}, false);
    return buffer;
  }

 private:
  float* load_weight(const AdamwTensor& t, int64_t first, int64_t n, float* buffer) const {
    if (t.master == kMasterFp32) return at<float>(t.weight, first);
    if (t.master == kMasterSplit) {
      kernels_.join_weights(at<const uint16_t>(t.weight, first), at<const uint16_t>(t.low, first), buffer, n);
    } else {
      floats(t.weight, kBfloat16, first, n, buffer);
    }
    return buffer;
  }

  void store_weight(const AdamwTensor& t, int64_t first, int64_t n, const float* w, float* change) const {
    switch (t.master) {
      case kMasterSplit:
        return kernels_.split_weights(w, at<uint16_t>(t.weight, first), at<uint16_t>(t.low, first), n);
      case kMasterKahan: {
        alignas(64) float lost[kChunk], rounded[kChunk];
        floats(t.low, kBfloat16, first, n, lost);
        kernels_.kahan_change(lost, change, w, rounded, n);
        narrow(rounded, formats_.bf16, t.weight, first, n);
        floats(t.weight, kBfloat16, first, n, rounded);
        kernels_.kahan_lost(lost, w, rounded, n);
        return narrow(lost, formats_.bf16, t.low, first, n);
      }
      case kMasterStochastic:
        return narrow(w, with_key(formats_.bf16_stochastic, t.weight_key), t.weight, first, n);
      default:
        return;
    }
  }

  float* load_moment(int64_t address, int64_t scales, int64_t state, int64_t first, int64_t n, bool root,
                     float* buffer) const {
    if (state == kStateFp32) return at<float>(address, first);
    if (state == kStateBf16) {
      floats(address, kBfloat16, first, n, buffer);
      return buffer;
    }
    kernels_.decode(at<const uint8_t>(address, first), false, n, buffer, codes_, false);
    for (int64_t i = 0; i < n; i += kStateBlock) {
      kernels_.unscale_block(buffer + i, std::min(kStateBlock, n - i), *at<float>(scales, (first + i) / kStateBlock),
                             root);
    }
    return buffer;
  }

  void store_moment(int64_t address, int64_t scales, int64_t state, int64_t first, int64_t n, bool root,
                    const float* value, uint64_t key) const {
    if (state == kStateFp32) return;
    if (state == kStateBf16) return narrow(value, with_key(formats_.bf16_stochastic, key), address, first, n);
    alignas(64) float scaled[kChunk];
    for (int64_t i = 0; i < n; i += kStateBlock) {
      *at<float>(scales, (first + i) / kStateBlock) =
          kernels_.scale_block(value + i, scaled + i, std::min(kStateBlock, n - i), root, formats_.codes);
    }
    kernels_.encode_floats(scaled, n, at<uint8_t>(address, first), with_key(formats_.codes_stochastic, key),
                           static_cast<uint64_t>(first));
  }

  void narrow(const float* x, const Rounder& rounder, int64_t address, int64_t first, int64_t n) const {
    kernels_.encode_floats(x, n, at<uint16_t>(address, first), rounder, static_cast<uint64_t>(first));
  }

  static Rounder with_key(Rounder rounder, uint64_t key) {
    rounder.key = key;
    return rounder;
  }

  const AdamwFormats& formats_;
  const Kernels& kernels_;
  const Decoding codes_;
};

}  // namespace

void adamw(const AdamwTensor* tensors, const AdamwCoefficients* coefficients, int64_t count,
           const AdamwFormats& formats, int threads) {
  const Sweep sweep(formats);
  in_chunks(tensors, count, kChunk, threads, [&](const AdamwTensor& t, int64_t first, int64_t n, int64_t) {
    sweep(t, coefficients[&t - tensors], first, n);
  });
}

void gradient_stats(const GradientTensor* tensors, int64_t count, const AdamwFormats& formats, double* out,
                    int threads) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < count; ++t) chunks += ceil_div(tensors[t].count, kStatsChunk);
  const std::unique_ptr<GradientStats[]> parts(new GradientStats[static_cast<size_t>(chunks)]);
  const Sweep sweep(formats);
  in_chunks(tensors, count, kStatsChunk, threads,
            [&](const GradientTensor& t, int64_t first, int64_t n, int64_t chunk) {
              alignas(64) float buffer[kStatsChunk];
              chosen().kernels->gradient_stats(sweep.floats(t.gradient, t.kind, first, n, buffer), n, &parts[chunk]);
            });
  int64_t chunk = 0;
  for (int64_t t = 0; t < count; ++t) {
    double* row = out + 4 * t;  // Inf, NaN, amax, sum of squares
    std::fill(row, row + 4, 0.0);
    for (const int64_t end = chunk + ceil_div(tensors[t].count, kStatsChunk); chunk < end; ++chunk) {
      row[0] += parts[chunk].infinite;
      row[1] += parts[chunk].nan;
      row[2] = std::max(row[2], static_cast<double>(parts[chunk].amax));
      row[3] += parts[chunk].sum_of_squares;
    }
  }
}

}  // namespace fewbits
