// Casts of whole tensors: chunks that fit the first cache pass through the steps that a cast is made of.
#include <algorithm>
#include <atomic>

#include "drive.hpp"
#include "parallel.hpp"

namespace fewbits {
namespace {

constexpr int64_t kChunk = 2048;            // elements: 8 KiB as float32
constexpr int64_t kBeyondCaches = 8 << 20;  // bytes of a result that would push everything else out of the caches
constexpr int64_t kChunksWorthAThread = 16;

// Where a result goes: straight to its place if it is small or fresh, else through a buffer and past the caches.
class Place {
 public:
  Place(void* to, int64_t bytes, bool fresh)
      : to_(static_cast<char*>(to)), past_caches_(bytes > kBeyondCaches && !fresh) {}
  template <class T>
  T* begin(int64_t offset, T* buffer) const {
    return past_caches_ ? buffer : reinterpret_cast<T*>(to_ + offset);
  }
  void end(int64_t offset, int64_t bytes, const void* buffer) const {
    if (past_caches_) chosen().kernels->stream_out(to_ + offset, buffer, bytes);
  }

 private:
  char* to_;
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

void encode(const void* x, const Codec* source, int64_t count, const Rounder& rounder, bool nibbles, bool fresh,
            void* codes, int threads) {
  const int64_t code_bytes = rounder.codec.code_bytes();
  const auto bytes = [&](int64_t n) { return nibbles ? n / 2 : n * code_bytes; };
  const Place place(codes, bytes(count), fresh);
  in_chunks(count, threads, [&](int64_t first, int64_t n) {
    alignas(64) float values[kChunk];
    alignas(64) uint16_t buffer[kChunk];
    alignas(64) uint8_t single[kChunk], packed[kChunk / 2];
    const Kernels& kernels = *chosen().kernels;
    const float* from = floats(x, source, first, n, values);
    if (nibbles) {
      kernels.encode_floats(from, n, single, rounder, static_cast<uint64_t>(first));
      kernels.pack_nibbles(single, n / 2, place.begin(bytes(first), packed));
      place.end(bytes(first), bytes(n), packed);
    } else {
      kernels.encode_floats(from, n, place.begin(bytes(first), buffer), rounder, static_cast<uint64_t>(first));
      place.end(bytes(first), bytes(n), buffer);
    }
  });
}

namespace {

// float32 values to their place, narrowed to 16 bits on the way where that is wanted; `fill` makes them.
template <class Fill>
void values_to(const Place& place, const Rounder* narrow, int64_t first, int64_t n, const Fill& fill) {
  alignas(64) float values[kChunk];
  alignas(64) uint16_t buffer[kChunk];
  if (narrow) {
    fill(values);
    chosen().kernels->encode_floats(values, n, place.begin(first * 2, buffer), *narrow, 0);
    place.end(first * 2, n * 2, buffer);
  } else {
    fill(place.begin(first * 4, values));
    place.end(first * 4, n * 4, values);
  }
}

}  // namespace

int32_t decode(const void* codes, const Codec& codec, int64_t count, bool nibbles, const Rounder* narrow, bool fresh,
               void* out, int threads) {
  std::atomic<uint32_t> seen{0};
  const Place place(out, count * (narrow ? 2 : 4), fresh);
  const Kernels& kernels = *chosen().kernels;
  in_chunks(count, threads, [&](int64_t first, int64_t n) {
    alignas(64) uint8_t single[kChunk];
    const auto* from = static_cast<const uint8_t*>(codes) + (nibbles ? first / 2 : first * codec.code_bytes());
    if (nibbles) {
      kernels.unpack_nibbles(from, n / 2, single);
      from = single;
    }
    values_to(place, narrow, first, n, [&](float* values) {
      seen.fetch_or(kernels.decode_codes(from, n, values, codec), std::memory_order_relaxed);
    });
  });
  return static_cast<int32_t>(seen.load());
}

void round(const void* x, const Codec* source, int64_t count, const Rounder& rounder, const Rounder* narrow, bool fresh,
           void* out, int threads) {
  const Place place(out, count * (narrow ? 2 : 4), fresh);
  const Kernels& kernels = *chosen().kernels;
  in_chunks(count, threads, [&](int64_t first, int64_t n) {
    alignas(64) float wide[kChunk];
    alignas(64) uint16_t codes[kChunk];
    kernels.encode_floats(floats(x, source, first, n, wide), n, codes, rounder, static_cast<uint64_t>(first));
    values_to(place, narrow, first, n, [&](float* values) { kernels.decode_codes(codes, n, values, rounder.codec); });
  });
}

}  // namespace fewbits
