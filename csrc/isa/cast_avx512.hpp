// The casts for which AVX-512 has a shorter way than the loops of cast.hpp; bit-equal to them.
//
//   1  decode, codes of at most 8 bits: all values have at most 8 significant bits, so a table holds their upper
//      halves, 256 x 16 bits in eight registers: four look-ups of 64 entries, and bits 6 and 7 choose among the four
//   2  fp16 both ways: an instruction; only NaN needs a hand. bf16 to nearest: two additions, and the upper half
//   3  decoded values go past the caches straight from the registers
//   4  stochastic rounding: shifts that differ by lane, where the plain loop computes in floats
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 takes its own _mm512_undefined for a mistake
#endif

#include "../cast.hpp"
#include "../kernels.hpp"

namespace {

struct Floats32 {
  __m512i low, high;
};

// 32 values from their upper halves.
inline Floats32 widened(__m512i upper) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(upper));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(upper, 1));
  return {_mm512_slli_epi32(low, 16), _mm512_slli_epi32(high, 16)};
}

// The upper half of the value of code 32 i + j is word j of part[i].
struct ByTable {
  explicit ByTable(const uint16_t* table) {
    for (int i = 0; i < 8; ++i) part[i] = _mm512_loadu_si512(table + 32 * i);
  }
  Floats32 of(__m512i codes) {
    seen = _mm512_or_si512(seen, codes);
    const __mmask32 bit6 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
    const __mmask32 bit7 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(128));
    const __m512i low = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(part[0], codes, part[1]),
                                                _mm512_permutex2var_epi16(part[2], codes, part[3]));
    const __m512i high = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(part[4], codes, part[5]),
                                                 _mm512_permutex2var_epi16(part[6], codes, part[7]));
    return widened(_mm512_mask_blend_epi16(bit7, low, high));
  }
  uint32_t any_bits() const {
    const uint32_t words = static_cast<uint32_t>(_mm512_reduce_or_epi32(seen));
    return (words | words >> 16) & 0xFFFF;
  }
  __m512i part[8], seen = _mm512_setzero_si512();
};

struct Bytes : ByTable {
  static constexpr int64_t kBytes = 32;  // that hold 32 codes
  using ByTable::ByTable;
  Floats32 operator()(const uint8_t* codes) {
    return of(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))));
  }
};

struct Nibbles : ByTable {
  static constexpr int64_t kBytes = 16;
  using ByTable::ByTable;
  Floats32 operator()(const uint8_t* codes) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return of(_mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12)), _mm512_set1_epi16(15)));
  }
};

struct Bf16 {
  static constexpr int64_t kBytes = 64;
  Floats32 operator()(const uint8_t* codes) const {
    const __m512i upper = _mm512_loadu_si512(codes);
    const __m512i magnitude = _mm512_and_si512(upper, _mm512_set1_epi16(0x7FFF));
    const __mmask32 nan = _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(0x7F80));
    return widened(_mm512_mask_mov_epi16(upper, nan, _mm512_set1_epi16(0x7FC0)));
  }
  uint32_t any_bits() const { return 0; }
};

struct Fp16 {
  static constexpr int64_t kBytes = 64;
  Floats32 operator()(const uint8_t* codes) const { return {sixteen(codes), sixteen(codes + 32)}; }
  static __m512i sixteen(const uint8_t* codes) {
    const __m512 x = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_castps_si512(x), nan, _mm512_set1_epi32(0x7FC00000));
  }
  uint32_t any_bits() const { return 0; }
};

template <class Source>
uint32_t decode_by_32(const uint8_t* codes, int64_t count, float* out, bool past_caches, Source source) {
  int64_t i = 0;
  if (past_caches && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    for (; i + 32 <= count; i += 32, codes += Source::kBytes) {
      const Floats32 values = source(codes);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), values.low);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i + 16), values.high);
    }
  }
  for (; i + 32 <= count; i += 32, codes += Source::kBytes) {
    const Floats32 values = source(codes);
    _mm512_storeu_si512(out + i, values.low);
    _mm512_storeu_si512(out + i + 16, values.high);
  }
  if (i < count) {
    uint8_t last[64] = {};
    std::memcpy(last, codes, static_cast<size_t>((count - i) * Source::kBytes / 32));
    const Floats32 values = source(last);
    std::memcpy(out + i, &values, static_cast<size_t>(count - i) * sizeof(float));
  }
  return source.any_bits();
}

inline bool is_binary16(const Codec& f) {
  return f.bits == 16 && f.sign == Codec::kMagnitude && f.mantissa_bits == 10 && f.emin == -14 &&
         f.inf_code == 0x7C00 && f.nan_above == 0x7C00;
}

inline bool is_bfloat16(const Codec& f) {
  return f.bits == 16 && f.sign == Codec::kMagnitude && f.mantissa_bits == 7 && f.emin == -126 &&
         f.inf_code == 0x7F80 && f.nan_above == 0x7F80;
}

uint32_t decode_avx512(const uint8_t* codes, bool nibbles, int64_t count, float* out, const Decoding& how,
                       bool past_caches) {
  if (nibbles) return decode_by_32(codes, count, out, past_caches, Nibbles(how.upper_halves));
  if (how.codec.bits <= 8) return decode_by_32(codes, count, out, past_caches, Bytes(how.upper_halves));
  if (is_binary16(how.codec)) return decode_by_32(codes, count, out, past_caches, Fp16());
  if (is_bfloat16(how.codec)) return decode_by_32(codes, count, out, past_caches, Bf16());
  return decode(codes, nibbles, count, out, how, past_caches);
}

struct ToFp16 {
  static __m256i of(__m512i x) { return _mm512_cvtps_ph(_mm512_castsi512_ps(x), _MM_FROUND_TO_NEAREST_INT); }
};

struct ToBf16 {
  static __m256i of(__m512i x) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7FFF)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
};

template <class To>
void encode_by_16(const float* x, int64_t count, uint16_t* codes, int32_t nan_code) {
  const __m256i nan = _mm256_set1_epi16(static_cast<int16_t>(nan_code));
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 here = static_cast<__mmask16>(count - i < 16 ? (1 << (count - i)) - 1 : 0xFFFF);
    const __m512i bits = _mm512_maskz_loadu_epi32(here, x + i);
    const __m512 value = _mm512_castsi512_ps(bits);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    _mm256_mask_storeu_epi16(codes + i, here, _mm256_mask_mov_epi16(To::of(bits), is_nan, nan));
  }
}

// 16 words of the stream that fewbits::random_word defines.
inline __m512i random_words(__m512i word, __m512i key) {
  word = _mm512_xor_si512(word, _mm512_srli_epi32(word, 16));
  word = _mm512_mullo_epi32(word, _mm512_set1_epi32(0x7FEB352D));
  word = _mm512_xor_si512(_mm512_xor_si512(word, _mm512_srli_epi32(word, 15)), key);
  word = _mm512_mullo_epi32(word, _mm512_set1_epi32(static_cast<int32_t>(0x846CA68B)));
  return _mm512_xor_si512(word, _mm512_srli_epi32(word, 16));
}

// encode_plain_stochastic by shifts that differ by lane. Counts of 32 and more, or below 0, shift everything out.
//
//      magnitude or significand   | kept | first 32 dropped bits | the rest
//                                         + random word: a carry is one more in kept
//
// The significand of a subnormal float32 is wrong, in bits that `covers` says are all in the rest.
template <bool kFloatExponents, class Code>
void encode_stochastic(const float* x, int64_t count, Code* codes, const Rounder& rounder, uint64_t position) {
  const Codec f = rounder.codec;
  const RandomKey key(rounder, position);
  const int32_t drop = kFloatMantissa - f.mantissa_bits;
  const __m512i smallest_normal = _mm512_set1_epi32((f.emin + 127) << kFloatMantissa);
  const __m512i rebias = _mm512_set1_epi32((f.emin + 126) << f.mantissa_bits);
  const __m512i least_shift = _mm512_set1_epi32(drop), shift_of_field_0 = _mm512_set1_epi32(drop + f.emin + 127);
  const __m512i key_high = _mm512_set1_epi32(static_cast<int32_t>(key.high)), thirty_two = _mm512_set1_epi32(32);
  __m512i counter = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(key.low)),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int64_t i = 0; i < count; i += 16, counter = _mm512_add_epi32(counter, _mm512_set1_epi32(16))) {
    const __mmask16 here = static_cast<__mmask16>(count - i < 16 ? (1 << (count - i)) - 1 : 0xFFFF);
    const __m512i bits = _mm512_maskz_loadu_epi32(here, x + i), random = random_words(counter, key_high);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    __m512i code;
    if constexpr (kFloatExponents) {
      code = _mm512_srli_epi32(_mm512_add_epi32(magnitude, _mm512_srli_epi32(random, 32 - drop)), drop);
    } else {
      const __mmask16 normal = _mm512_cmpge_epi32_mask(magnitude, smallest_normal);
      const __m512i whole =
          _mm512_or_si512(_mm512_and_si512(magnitude, _mm512_set1_epi32(0x7FFFFF)), _mm512_set1_epi32(0x800000));
      const __m512i value = _mm512_mask_mov_epi32(whole, normal, magnitude);
      const __m512i by_field = _mm512_sub_epi32(shift_of_field_0, _mm512_srli_epi32(magnitude, kFloatMantissa));
      const __m512i shift = _mm512_max_epi32(by_field, least_shift);
      const __m512i first = _mm512_or_si512(_mm512_sllv_epi32(value, _mm512_sub_epi32(thirty_two, shift)),
                                            _mm512_srlv_epi32(value, _mm512_sub_epi32(shift, thirty_two)));
      const __mmask16 carry = _mm512_cmplt_epu32_mask(_mm512_add_epi32(first, random), first);
      code = _mm512_srlv_epi32(value, shift);
      code = _mm512_mask_add_epi32(code, carry, code, _mm512_set1_epi32(1));
      code = _mm512_mask_sub_epi32(code, normal, code, rebias);
    }
    code = _mm512_min_epi32(code, _mm512_set1_epi32(rounder.over[0]));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 32 - f.bits), _mm512_set1_epi32(1 << (f.bits - 1)));
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(kFloatInf));
    code = _mm512_mask_mov_epi32(_mm512_or_si512(code, sign), nan, _mm512_set1_epi32(f.nan_code));
    if constexpr (sizeof(Code) == 1)
      _mm_mask_storeu_epi8(codes + i, here, _mm512_cvtepi32_epi8(code));
    else
      _mm256_mask_storeu_epi16(codes + i, here, _mm512_cvtepi32_epi16(code));
  }
}

inline bool covers(const Rounder& rounder) {
  const Codec& f = rounder.codec;
  return is_plain(rounder) && (f.emin == -126 || kFloatMantissa - f.mantissa_bits + f.emin + 127 >= 32 + 24);
}

template <class Code>
void encode_stochastic_as(const float* x, int64_t count, Code* codes, const Rounder& rounder, uint64_t position) {
  if (rounder.codec.emin == -126) return encode_stochastic<true>(x, count, codes, rounder, position);
  encode_stochastic<false>(x, count, codes, rounder, position);
}

void encode_avx512(const float* x, int64_t count, void* codes, const Rounder& rounder, uint64_t position) {
  const Codec& f = rounder.codec;
  const bool to_inf = rounder.over[0] == f.inf_code && rounder.over[1] == f.inf_code && rounder.inf[0] == f.inf_code &&
                      rounder.inf[1] == f.inf_code;
  if (rounder.rounding == fewbits::kNearestEven && to_inf && is_binary16(f))
    return encode_by_16<ToFp16>(x, count, static_cast<uint16_t*>(codes), f.nan_code);
  if (rounder.rounding == fewbits::kNearestEven && to_inf && is_bfloat16(f))
    return encode_by_16<ToBf16>(x, count, static_cast<uint16_t*>(codes), f.nan_code);
  if (rounder.rounding == fewbits::kStochastic && covers(rounder)) {
    if (f.code_bytes() == 1) return encode_stochastic_as(x, count, static_cast<uint8_t*>(codes), rounder, position);
    return encode_stochastic_as(x, count, static_cast<uint16_t*>(codes), rounder, position);
  }
  encode_floats(x, count, codes, rounder, position);
}

constexpr fewbits::Kernels with_avx512(fewbits::Kernels kernels) {
  kernels.decode = decode_avx512;
  kernels.encode_floats = encode_avx512;
  return kernels;
}

}  // namespace
