// Casts of whole tensors: chunks that fit the first cache pass through the steps that a cast is made of.
#include <algorithm>
#include <atomic>
#include <bit>

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
  char* at(int64_t offset) const { return to_ + offset; }
  bool past_caches() const { return past_caches_; }

 private:
  char* to_;
  bool past_caches_;
};

// float32 as it is, or 16-bit floats made float32 in the buffer.
const float* floats(const void* x, const Codec* codec, int64_t first, int64_t count, float* buffer) {
  if (!codec) return static_cast<const float*>(x) + first;
  chosen().kernels->decode(static_cast<const uint8_t*>(x) + first * 2, false, count, buffer, {*codec, {}}, false);
  return buffer;
}

template <class Work>
void in_chunks(int64_t count, int threads, const Work& work) {
  const int64_t chunks = ceil_div(count, kChunk);
  const int useful = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, chunks / kChunksWorthAThread)));
  parallel_ranges(useful, chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) work(chunk * kChunk, std::min(kChunk, count - chunk * kChunk));
    chosen().kernels->end_stream();
  });
}

}  // namespace

Decoding decoding_of(const Codec& codec) {
  Decoding how{codec, {}};
  if (codec.bits > 8) return how;
  uint8_t codes[256];
  float values[256];
  for (int code = 0; code < 256; ++code) codes[code] = static_cast<uint8_t>(code);
  chosen().kernels->decode_codes(codes, 256, values, codec);
  for (int code = 0; code < 256; ++code)
    how.upper_halves[code] = static_cast<uint16_t>(std::bit_cast<uint32_t>(values[code]) >> 16);
  return how;
}

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
  if (!narrow) return fill(reinterpret_cast<float*>(place.at(first * 4)), place.past_caches());
  alignas(64) float values[kChunk];
  alignas(64) uint16_t buffer[kChunk];
  fill(values, false);
  chosen().kernels->encode_floats(values, n, place.begin(first * 2, buffer), *narrow, 0);
  place.end(first * 2, n * 2, buffer);
}

}  // namespace

int32_t decode(const void* codes, const Codec& codec, int64_t count, bool nibbles, const Rounder* narrow, bool fresh,
               void* out, int threads) {
  std::atomic<uint32_t> seen{0};
  const Place place(out, count * (narrow ? 2 : 4), fresh);
  const Kernels& kernels = *chosen().kernels;
  const Decoding how = decoding_of(codec);
  in_chunks(count, threads, [&](int64_t first, int64_t n) {
    const auto* from = static_cast<const uint8_t*>(codes) + (nibbles ? first / 2 : first * codec.code_bytes());
    values_to(place, narrow, first, n, [&](float* values, bool past_caches) {
      const uint32_t bits = kernels.decode(from, nibbles, n, values, how, past_caches);
      if (bits >> codec.bits) seen.store(bits, std::memory_order_relaxed);  // an atomic or would wait like end_stream
    });
  });
  return static_cast<int32_t>(seen.load());
}

void round(const void* x, const Codec* source, int64_t count, const Rounder& rounder, const Rounder* narrow, bool fresh,
           void* out, int threads) {
  const Place place(out, count * (narrow ? 2 : 4), fresh);
  const Kernels& kernels = *chosen().kernels;
  const Decoding how = decoding_of(rounder.codec);
  in_chunks(count, threads, [&](int64_t first, int64_t n) {
    alignas(64) float wide[kChunk];
    alignas(64) uint8_t codes[2 * kChunk];
    kernels.encode_floats(floats(x, source, first, n, wide), n, codes, rounder, static_cast<uint64_t>(first));
    values_to(place, narrow, first, n,
              [&](float* values, bool past_caches) { kernels.decode(codes, false, n, values, how, past_caches); });
  });
}

}  // namespace fewbits
