// Casts of whole tensors: chunks that fit the first cache pass through the steps that a cast is made of.
#include <algorithm>

#include "drive.hpp"
#include "parallel.hpp"

namespace fewbits {
namespace {

constexpr int64_t kChunk = 2048;            // elements: 8 KiB as float32
constexpr int64_t kBeyondCaches = 8 << 20;  // bytes of a result that would push everything else out of the caches
constexpr int64_t kChunksWorthAThread = 16;

// Where a result goes: straight to its place if it is small, else through a buffer and past the caches.
class Place {
 public:
  Place(void* to, int64_t total_bytes, int64_t element_bytes)
      : to_(static_cast<char*>(to)), bytes_(element_bytes), past_caches_(total_bytes > kBeyondCaches) {}
  void* begin(int64_t element, void* buffer) const { return past_caches_ ? buffer : to_ + element * bytes_; }
  void end(int64_t element, int64_t count, const void* buffer) const {
    if (past_caches_) chosen().kernels->stream_out(to_ + element * bytes_, buffer, count * bytes_);
  }

 private:
  char* to_;
  int64_t bytes_;
  bool past_caches_;
};

// float32 as it is, or 16-bit floats made float32 in the buffer.
const float* floats(const void* x, const Codec* codec, int64_t first, int64_t count, float* buffer) {
  if (!codec) return static_cast<const float*>(x) + first;
  chosen().kernels->decode_codes(static_cast<const uint16_t*>(x) + first, count, buffer, *codec);
  return buffer;
}

template <class Work>
void in_chunks(int64_t count, int threads, const Work& work) {
  const int64_t chunks = ceil_div(count, kChunk);
  const int useful = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, chunks / kChunksWorthAThread)));
  parallel_ranges(useful, chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) work(chunk * kChunk, std::min(kChunk, count - chunk * kChunk));
  });
}

}  // namespace

void encode(const void* x, const Codec* source, int64_t count, const Rounder& rounder, void* codes, int threads) {
  const Place place(codes, count * rounder.codec.code_bytes(), rounder.codec.code_bytes());
  in_chunks(count, threads, [&](int64_t first, int64_t n) {
    alignas(64) float values[kChunk];
    alignas(64) uint16_t buffer[kChunk];
    void* to = place.begin(first, buffer);
    chosen().kernels->encode_floats(floats(x, source, first, n, values), n, to, rounder, static_cast<uint64_t>(first));
    place.end(first, n, buffer);
  });
}

void decode(const void* codes, const Codec& codec, int64_t count, const Rounder* narrow, void* out, int threads) {
  const int64_t out_bytes = narrow ? 2 : 4;
  const Place place(out, count * out_bytes, out_bytes);
  in_chunks(count, threads, [&](int64_t first, int64_t n) {
    alignas(64) float values[kChunk];
    alignas(64) uint16_t buffer[kChunk];
    const Kernels& kernels = *chosen().kernels;
    float* wide = narrow ? values : static_cast<float*>(place.begin(first, values));
    kernels.decode_codes(static_cast<const char*>(codes) + first * codec.code_bytes(), n, wide, codec);
    if (narrow) kernels.encode_floats(values, n, place.begin(first, buffer), *narrow, 0);
    place.end(first, n, narrow ? static_cast<void*>(buffer) : values);
  });
}

void round(const void* x, const Codec* source, int64_t count, const Rounder& rounder, const Rounder* narrow, void* out,
           int threads) {
  const int64_t out_bytes = narrow ? 2 : 4;
  const Place place(out, count * out_bytes, out_bytes);
  in_chunks(count, threads, [&](int64_t first, int64_t n) {
    alignas(64) float values[kChunk];
    alignas(64) uint16_t codes[kChunk];
    alignas(64) uint16_t buffer[kChunk];
    const Kernels& kernels = *chosen().kernels;
    kernels.encode_floats(floats(x, source, first, n, values), n, codes, rounder, static_cast<uint64_t>(first));
    float* wide = narrow ? values : static_cast<float*>(place.begin(first, values));
    kernels.decode_codes(codes, n, wide, rounder.codec);
    if (narrow) kernels.encode_floats(values, n, place.begin(first, buffer), *narrow, 0);
    place.end(first, n, narrow ? static_cast<void*>(buffer) : values);
  });
}

}  // namespace fewbits
