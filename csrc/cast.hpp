// encode_floats: float32 -> codes of any format up to 16 bits, rounded once. decode_codes: codes -> float32, exact.
//
// The ladder
//   1  one plain loop over 32-bit integers for every format and instruction set, which the compiler vectorizes: the
//      fields of a float32 are cut and put together with shifts that differ by lane, so subnormals need no branch.
//      Rounding and kind of sign are template parameters: what differs by call and not by lane is out of the loop
//   2  bfloat16 and float32 share exponents: decoding is one shift
//   3  round to nearest: one shift for all normal lanes, and for the others a float addition that rounds in hardware
//   4  results leave the cores by non-temporal stores where they are larger than the caches (stream_out)
//   5  AVX-512: isa/cast_avx512.hpp
//
// The meaning is fewbits/tensors/codes.py, on doubles; this is bit-equal. Included once per instruction set.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "cast_job.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using fewbits::Codec;
using fewbits::Decoding;
using fewbits::Rounder;

constexpr int32_t kFloatMantissa = 23;
constexpr int32_t kFloatInf = 0x7F800000;

// The significand, an integer below 2^24, without its last `shift` bits (of `drop` that the format has no room for).
template <int kRounding>
inline int32_t shift_out(int32_t significand, int32_t shift, int32_t drop, bool negative, uint32_t random) {
  const int32_t unit = 1 << shift;
  if constexpr (kRounding == fewbits::kNearestEven) {
    const int32_t odd = (significand >> shift) & 1;
    return (significand + (unit >> 1) - 1 + odd) >> shift;
  } else if constexpr (kRounding == fewbits::kNearestAway) {
    return (significand + (unit >> 1)) >> shift;
  } else if constexpr (kRounding == fewbits::kTowardZero) {
    return significand >> shift;
  } else if constexpr (kRounding == fewbits::kUp || kRounding == fewbits::kDown) {
    const bool away = negative == (kRounding == fewbits::kDown);
    return (significand + (away ? unit - 1 : 0)) >> shift;
  } else {
    // The first 32 dropped bits as a fraction of 2^32; adding the random word carries with that probability.
    const uint32_t rest = static_cast<uint32_t>(significand) & (static_cast<uint32_t>(unit) - 1);
    const int32_t deeper = drop > 56 ? 24 : drop - 32;
    const uint32_t first = drop > 32 ? rest >> (deeper & 31) : rest << ((32 - drop) & 31);
    return (significand >> shift) + static_cast<int32_t>(first + random < first);
  }
}

// Random words: of the key and the position alone. The high half of the position must not change within a call.
struct RandomKey {
  RandomKey(const Rounder& rounder, uint64_t position)
      : low(static_cast<uint32_t>(rounder.key) + static_cast<uint32_t>(position)),
        high(static_cast<uint32_t>(rounder.key >> 32) + static_cast<uint32_t>(position >> 32) * 0x9E3779B9u) {}
  uint32_t word(int64_t i) const { return fewbits::random_word(low + static_cast<uint32_t>(i), high); }
  uint32_t low, high;
};

template <int kRounding, int kSign, class Code>
void encode_loop(const float* __restrict x, int64_t count, Code* __restrict codes, const Rounder& rounder,
                 uint64_t position) {
  const Codec f = rounder.codec;
  const int32_t over_positive = rounder.over[0], over_negative = rounder.over[1];
  const int32_t inf_positive = rounder.inf[0], inf_negative = rounder.inf[1];
  const int32_t full_drop = kFloatMantissa - f.mantissa_bits;
  const bool no_zero = !f.has_subnormals;
  const int32_t without_field = no_zero ? 1 << f.mantissa_bits : 0;
  const int32_t sign_bit = 1 << (f.bits - 1), code_mask = 2 * sign_bit - 1;
  const RandomKey key(rounder, position);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = std::bit_cast<int32_t>(x[i]);
    const int32_t magnitude = bits & 0x7FFFFFFF;
    const bool negative = bits < 0;
    uint32_t random = 0;
    if constexpr (kRounding == fewbits::kStochastic) random = key.word(i);

    const int32_t field = magnitude >> kFloatMantissa;
    const int32_t implicit = field > 0 ? 1 << kFloatMantissa : 0;
    const int32_t above = (field > 1 ? field : 1) - 127 - f.emin;  // exponents above the smallest normal one
    const int32_t significand = (magnitude & ((1 << kFloatMantissa) - 1)) | implicit;
    const int32_t drop = full_drop - (above < 0 ? above : 0);
    const int32_t shift = drop < 25 ? drop : 25;  // 25 leaves nothing, and is less than half
    const int32_t kept = shift_out<kRounding>(significand, shift, drop, negative, random);

    // The implicit one of the significand adds the 1 that makes exponent field 0 into 1.
    int32_t code = ((above > 0 ? above : 0) << f.mantissa_bits) + kept - without_field;
    code = no_zero & ((above < 0) | (magnitude == 0)) ? 0 : code;

    const bool is_inf = magnitude == kFloatInf;
    const int32_t limit = negative ? f.max_negative : f.max_code;
    const int32_t beyond = negative ? over_negative : over_positive;
    const int32_t infinite = negative ? inf_negative : inf_positive;
    code = code > limit ? beyond : code;
    code = is_inf ? infinite : code;

    if constexpr (kSign == Codec::kTwosComplement) {
      code = negative ? -code & code_mask : code;
    } else if constexpr (kSign == Codec::kUnsigned) {
      const bool below_zero = negative & (magnitude != 0) & (code >= f.signed_from);
      code = below_zero ? f.negative_code : code;
    } else {
      const bool takes_sign = negative & (code >= f.signed_from) & (code != f.never_signed);
      code = takes_sign ? code | sign_bit : code;
    }
    codes[i] = static_cast<Code>(magnitude > kFloatInf ? f.nan_code : code);
  }
}

// Signed formats with subnormals and -0 whose overflow never gives an unsigned NaN: nothing depends on the sign but
// the sign bit, and Inf becomes what any value beyond the range becomes, the largest value or the code after it. With
// no mantissa bits every significand is 1, odd, so that ties go up; the last bit of the code would say otherwise.
inline bool is_plain(const Rounder& rounder) {
  const Codec& f = rounder.codec;
  if (f.sign != Codec::kMagnitude || !f.has_subnormals || f.signed_from != 0 || f.mantissa_bits == 0) return false;
  const int32_t code_of_inf = (128 - f.emin + 1) << f.mantissa_bits;  // as if Inf were 2^128
  const int32_t beyond = rounder.over[0];
  return code_of_inf > f.max_code && rounder.over[1] == beyond && rounder.inf[0] == beyond &&
         rounder.inf[1] == beyond && beyond != f.never_signed && beyond <= f.max_code + 1;
}

// Round to nearest even, plain formats. Above the smallest normal value all lanes drop the same bits. Below it the
// processor rounds: in x + 2^(emin - mantissa_bits + 23) the last bit of the sum is the last bit of the code.
template <class Code>
void encode_plain_nearest(const float* __restrict x, int64_t count, Code* __restrict codes, const Rounder& rounder) {
  const Codec f = rounder.codec;
  const int32_t drop = kFloatMantissa - f.mantissa_bits, half = (1 << drop) >> 1;
  const int32_t smallest_normal = (f.emin + 127) << kFloatMantissa;
  // What rounds, less what takes the exponent to the format's.
  const int32_t offset = half - 1 - ((f.emin + 126) << kFloatMantissa);
  const int32_t anchor = f.emin == -126 ? 0 : (f.emin - f.mantissa_bits + 23 + 127) << kFloatMantissa;
  const int32_t normal_from = f.emin == -126 ? 0 : smallest_normal;
  const int32_t beyond = rounder.over[0], sign_shift = 32 - f.bits, sign_bit = 1 << (f.bits - 1);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = std::bit_cast<int32_t>(x[i]);
    const int32_t magnitude = bits & 0x7FFFFFFF;
    const int32_t normal = (magnitude + offset + ((magnitude >> drop) & 1)) >> drop;
    const int32_t small =
        std::bit_cast<int32_t>(std::bit_cast<float>(magnitude) + std::bit_cast<float>(anchor)) - anchor;
    int32_t code = magnitude < normal_from ? small : normal;
    code = code < beyond ? code : beyond;
    // NaN before the sign: else GCC narrows the code for the sign, and widens it again for the choice.
    const bool is_nan = magnitude > kFloatInf;
    const int32_t sign = static_cast<int32_t>(static_cast<uint32_t>(bits) >> sign_shift) & sign_bit;
    codes[i] = static_cast<Code>((is_nan ? f.nan_code : code) | (is_nan ? 0 : sign));
  }
}

// Stochastic, plain formats. Above the smallest normal value the random bits are added where the dropped bits are.
// Below it, x in units of the last code bit is cut into whole and fraction; all of it exact.
template <class Code>
void encode_plain_stochastic(const float* __restrict x, int64_t count, Code* __restrict codes, const Rounder& rounder,
                             uint64_t position) {
  const Codec f = rounder.codec;
  const int32_t drop = kFloatMantissa - f.mantissa_bits;
  const int32_t normal_from = f.emin == -126 ? 0 : (f.emin + 127) << kFloatMantissa;
  const int32_t rebias = (f.emin + 126) << f.mantissa_bits;
  const int32_t unit_exponent = f.mantissa_bits - f.emin;  // at most 126 - 1 where it is used
  const float to_units = std::bit_cast<float>((f.emin == -126 ? 127 : unit_exponent + 127) << kFloatMantissa);
  const float most = static_cast<float>(1 << f.mantissa_bits);
  const int32_t beyond = rounder.over[0], sign_shift = 32 - f.bits, sign_bit = 1 << (f.bits - 1);
  const RandomKey key(rounder, position);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = std::bit_cast<int32_t>(x[i]);
    const int32_t magnitude = bits & 0x7FFFFFFF;
    const uint32_t random = key.word(i);
    const int32_t added = magnitude + static_cast<int32_t>(random >> (32 - drop));
    const int32_t normal = static_cast<int32_t>(static_cast<uint32_t>(added) >> drop) - rebias;
    float units = std::bit_cast<float>(magnitude) * to_units;
    units = units < most ? units : most;  // other lanes take `normal`, but must not overflow an integer
    const int32_t whole = static_cast<int32_t>(units);
    // The fraction's first 32 bits in two halves: float to unsigned is slow before AVX-512.
    const float upper_units = (units - static_cast<float>(whole)) * 65536.0f;
    const int32_t upper = static_cast<int32_t>(upper_units);
    const int32_t lower = static_cast<int32_t>((upper_units - static_cast<float>(upper)) * 65536.0f);
    const uint32_t first = static_cast<uint32_t>(upper) << 16 | static_cast<uint32_t>(lower);
    const int32_t small = whole + static_cast<int32_t>(first + random < first);
    const int32_t is_small = -static_cast<int32_t>(magnitude < normal_from);  // a choice by mask: never a branch
    int32_t code = (small & is_small) | (normal & ~is_small);
    code = code > f.max_code ? beyond : code;
    code |= static_cast<int32_t>(static_cast<uint32_t>(bits) >> sign_shift) & sign_bit;
    codes[i] = static_cast<Code>(magnitude > kFloatInf ? f.nan_code : code);
  }
}

template <int kRounding, class Code>
void encode_rounded(const float* x, int64_t count, Code* codes, const Rounder& rounder, uint64_t position) {
  switch (rounder.codec.sign) {
    case Codec::kTwosComplement:
      return encode_loop<kRounding, Codec::kTwosComplement>(x, count, codes, rounder, position);
    case Codec::kUnsigned:
      return encode_loop<kRounding, Codec::kUnsigned>(x, count, codes, rounder, position);
    default:
      return encode_loop<kRounding, Codec::kMagnitude>(x, count, codes, rounder, position);
  }
}

template <class Code>
void encode_as(const float* x, int64_t count, Code* codes, const Rounder& rounder, uint64_t position) {
  if (rounder.rounding == fewbits::kNearestEven && is_plain(rounder))
    return encode_plain_nearest(x, count, codes, rounder);
  if (rounder.rounding == fewbits::kStochastic && is_plain(rounder))
    return encode_plain_stochastic(x, count, codes, rounder, position);
  switch (rounder.rounding) {
    case fewbits::kNearestEven:
      return encode_rounded<fewbits::kNearestEven>(x, count, codes, rounder, position);
    case fewbits::kNearestAway:
      return encode_rounded<fewbits::kNearestAway>(x, count, codes, rounder, position);
    case fewbits::kTowardZero:
      return encode_rounded<fewbits::kTowardZero>(x, count, codes, rounder, position);
    case fewbits::kUp:
      return encode_rounded<fewbits::kUp>(x, count, codes, rounder, position);
    case fewbits::kDown:
      return encode_rounded<fewbits::kDown>(x, count, codes, rounder, position);
    default:
      return encode_rounded<fewbits::kStochastic>(x, count, codes, rounder, position);
  }
}

// The high half of position must not change within the call: it enters the random words once.
void encode_floats(const float* x, int64_t count, void* codes, const Rounder& rounder, uint64_t position) {
  if (rounder.codec.code_bytes() == 1) return encode_as(x, count, static_cast<uint8_t*>(codes), rounder, position);
  encode_as(x, count, static_cast<uint16_t*>(codes), rounder, position);
}

// Returns the bits that any code has. Values must be float32 values, smallest normal at least 2^-126: the caller
// checks.
template <int kSign, bool kFloatExponents, bool kInf, class Code>
uint32_t decode_loop(const Code* __restrict codes, int64_t count, float* __restrict out, const Codec& f) {
  const int32_t magnitude_mask = f.sign == Codec::kUnsigned ? (1 << f.bits) - 1 : (1 << (f.bits - 1)) - 1;
  const int32_t up = kFloatMantissa - f.mantissa_bits;
  const int32_t rebias = (f.emin - 1 + 127) * (1 << kFloatMantissa);
  const float step = std::bit_cast<float>((f.emin - f.mantissa_bits + 127) * (1 << kFloatMantissa));
  const int32_t sign_bits = 32 - f.bits, smallest_normal = 1 << f.mantissa_bits;
  uint32_t seen = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t code = codes[i];
    seen |= static_cast<uint32_t>(code);
    if constexpr (kSign == Codec::kTwosComplement) {
      const int32_t value = static_cast<int32_t>(static_cast<uint32_t>(code) << sign_bits) >> sign_bits;
      out[i] = static_cast<float>(value) * step;
      continue;
    }
    const int32_t magnitude = code & magnitude_mask;
    int32_t bits = (magnitude << up) + (kFloatExponents ? 0 : rebias);
    if constexpr (!kFloatExponents) {
      const int32_t small = std::bit_cast<int32_t>(static_cast<float>(magnitude) * step);
      bits = magnitude < smallest_normal ? small : bits;
    }
    if constexpr (kInf) bits = magnitude == f.inf_code ? kFloatInf : bits;
    if constexpr (kSign == Codec::kMagnitude) bits |= code > magnitude_mask ? INT32_MIN : 0;
    int32_t is_nan = magnitude > f.nan_above ? 1 : 0;
    if constexpr (kInf) is_nan |= code == f.nan_exactly ? 1 : 0;
    bits = is_nan ? 0x7FC00000 : bits;
    out[i] = std::bit_cast<float>(bits);
  }
  return seen;
}

template <int kSign, bool kFloatExponents, class Code>
uint32_t decode_signed(const Code* codes, int64_t count, float* out, const Codec& f) {
  const bool only_nan_above = f.inf_code < 0 && f.nan_exactly < 0;
  return only_nan_above ? decode_loop<kSign, kFloatExponents, false>(codes, count, out, f)
                        : decode_loop<kSign, kFloatExponents, true>(codes, count, out, f);
}

template <class Code>
uint32_t decode_as(const Code* codes, int64_t count, float* out, const Codec& f) {
  if (f.sign == Codec::kTwosComplement) return decode_loop<Codec::kTwosComplement, false, false>(codes, count, out, f);
  if (f.sign == Codec::kUnsigned) return decode_signed<Codec::kUnsigned, false>(codes, count, out, f);
  if (f.emin == -126) return decode_signed<Codec::kMagnitude, true>(codes, count, out, f);
  return decode_signed<Codec::kMagnitude, false>(codes, count, out, f);
}

uint32_t decode_codes(const void* codes, int64_t count, float* out, const Codec& f) {
  if (f.code_bytes() == 1) return decode_as(static_cast<const uint8_t*>(codes), count, out, f);
  return decode_as(static_cast<const uint16_t*>(codes), count, out, f);
}

// Two 4-bit codes to a byte, the first one low:  | code 1 | code 0 |  | code 3 | code 2 |  …
void pack_nibbles(const uint8_t* __restrict codes, int64_t bytes, uint8_t* __restrict packed) {
  for (int64_t i = 0; i < bytes; ++i) packed[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
}

void unpack_nibbles(const uint8_t* __restrict packed, int64_t bytes, uint8_t* __restrict codes) {
  for (int64_t i = 0; i < bytes; ++i) {
    codes[2 * i] = packed[i] & 15;
    codes[2 * i + 1] = packed[i] >> 4;
  }
}

// memcpy past the caches: the lines written are not read first, which would cost as much traffic again. Other threads
// may see it late: end_stream waits until they all can, a microsecond or so; once a thread, not once a chunk.
void stream_out(void* to, const void* from, int64_t bytes) {
#if defined(__AVX2__)
#if defined(__AVX512VNNI__)
  constexpr int64_t kWidth = 64;
#else
  constexpr int64_t kWidth = 32;
#endif
  if (reinterpret_cast<uintptr_t>(to) % kWidth == 0) {
    const int64_t whole = bytes / kWidth * kWidth;
    for (int64_t i = 0; i < whole; i += kWidth) {
      char* at = static_cast<char*>(to) + i;
      const char* source = static_cast<const char*>(from) + i;
#if defined(__AVX512VNNI__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(at), _mm512_loadu_si512(source));
#else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(at), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#endif
    }
    std::memcpy(static_cast<char*>(to) + whole, static_cast<const char*>(from) + whole, bytes - whole);
    return;
  }
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

void end_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// decode_codes, from nibbles too, and past the caches. The parts are so small that their stores wait in the store
// queue while the next part is made.
uint32_t decode(const uint8_t* codes, bool nibbles, int64_t count, float* out, const Decoding& how, bool past_caches) {
  constexpr int64_t kPart = 256;
  if (!nibbles && !past_caches) return decode_codes(codes, count, out, how.codec);
  uint32_t seen = 0;
  alignas(64) uint8_t single[kPart];
  alignas(64) float values[kPart];
  for (int64_t first = 0; first < count; first += kPart) {
    const int64_t n = count - first < kPart ? count - first : kPart;
    const uint8_t* from = codes + (nibbles ? first / 2 : first * how.codec.code_bytes());
    if (nibbles) {
      unpack_nibbles(from, n / 2, single);
      from = single;
    }
    seen |= decode_codes(from, n, past_caches ? values : out + first, how.codec);
    if (past_caches) stream_out(out + first, values, n * static_cast<int64_t>(sizeof(float)));
  }
  return seen;
}

}  // namespace
