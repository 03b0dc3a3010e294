// Vectors of 32-bit lanes, of the width that the including file's instruction set has: 16, 8, or 1.
//
// A kernel written with them is one text for every instruction set. Each function rounds as the scalar one does, so
// results are bit-equal; but multiply_add, which rounds once with AVX-512 and twice elsewhere.
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 takes its own _mm512_undefined for a mistake
#endif
#endif

namespace {

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

inline int32_t word_at(const void* bytes) {
  int32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

#if defined(__AVX512VNNI__)

// A block of sums: 12 rows × 2 vectors, 24 of 32 registers. Blocks of few rows wait for the memory, and have registers
// to spare.
constexpr int kVectorWords = 16, kBlockVectors = 2, kBlockRows = 12, kRowsFromMemory = 2;
using Words = __m512i;
using Floats = __m512;

inline Words load_words(const void* from) { return _mm512_loadu_si512(from); }
inline Words same_word(int32_t word) { return _mm512_set1_epi32(word); }
inline Floats same_float(float value) { return _mm512_set1_ps(value); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline void store_floats(float* to, Floats values) { _mm512_storeu_ps(to, values); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Words plus(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Floats to_floats(Words integers) { return _mm512_cvtepi32_ps(integers); }
inline Floats as_floats(Words bits) { return _mm512_castsi512_ps(bits); }
inline Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
template <int Bits>
inline Words up(Words words) {
  return _mm512_slli_epi32(words, Bits);
}
template <int Bits>
inline Words down(Words words) {
  return _mm512_srli_epi32(words, Bits);
}
template <int Bits>
inline Words down_signed(Words words) {
  return _mm512_srai_epi32(words, Bits);
}
inline Words load_halves_up(const uint16_t* from) {
  return up<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
// (words & mask) ^ flipped
inline Words masked_flipped(Words words, Words mask, Words flipped) {
  return _mm512_ternarylogic_epi32(words, mask, flipped, 0x6A);
}
// sums + Σ of four products, of bytes 0 … 15 and the signed bytes of one word for all lanes. Not the intrinsic: GCC 12
// copies its sums between registers and to memory, and does not broadcast from memory in the instruction.
inline Words dot(Words sums, Words nibbles, const void* word) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(nibbles), "m"(*static_cast<const int32_t*>(word)));
  return sums;
}

struct Table16 {
  explicit Table16(const float* values) : all(_mm512_loadu_ps(values)) {}
  Floats operator[](Words codes) const { return _mm512_permutexvar_ps(codes, all); }  // looks at 4 bits of each
  __m512 all;
};

#elif defined(__AVX2__)

constexpr int kVectorWords = 8, kBlockVectors = 2, kBlockRows = 4, kRowsFromMemory = 1;
using Words = __m256i;
using Floats = __m256;

inline Words load_words(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline Words same_word(int32_t word) { return _mm256_set1_epi32(word); }
inline Floats same_float(float value) { return _mm256_set1_ps(value); }
inline Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
inline void store_floats(float* to, Floats values) { _mm256_storeu_ps(to, values); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Words plus(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return add(multiply(a, b), sum); }
inline Floats to_floats(Words integers) { return _mm256_cvtepi32_ps(integers); }
inline Floats as_floats(Words bits) { return _mm256_castsi256_ps(bits); }
inline Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
template <int Bits>
inline Words up(Words words) {
  return _mm256_slli_epi32(words, Bits);
}
template <int Bits>
inline Words down(Words words) {
  return _mm256_srli_epi32(words, Bits);
}
template <int Bits>
inline Words down_signed(Words words) {
  return _mm256_srai_epi32(words, Bits);
}
inline Words load_halves_up(const uint16_t* from) {
  return up<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Words masked_flipped(Words words, Words mask, Words flipped) {
  return _mm256_xor_si256(both(words, mask), flipped);
}
// The 16-bit sums of two products are at most 2 · 15 · 128: they do not saturate.
inline Words dot(Words sums, Words nibbles, const void* word) {
  const Words pairs = _mm256_maddubs_epi16(nibbles, same_word(word_at(word)));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

struct Table16 {
  explicit Table16(const float* values) : low(load_floats(values)), high(load_floats(values + 8)) {}
  Floats operator[](Words codes) const {  // the permutations look at 3 bits of each, the choice at the fourth
    const Floats chosen = as_floats(up<28>(codes));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), chosen);
  }
  __m256 low, high;
};

#else

constexpr int kVectorWords = 1, kBlockVectors = 1, kBlockRows = 1, kRowsFromMemory = 1;
using Words = int32_t;
using Floats = float;

inline Words load_words(const void* from) { return word_at(from); }
inline Words same_word(int32_t word) { return word; }
inline Floats same_float(float value) { return value; }
inline Floats load_floats(const float* from) { return *from; }
inline void store_floats(float* to, Floats value) { *to = value; }
inline Floats add(Floats a, Floats b) { return a + b; }
inline Words plus(Words a, Words b) { return a + b; }
inline Floats multiply(Floats a, Floats b) { return a * b; }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return a * b + sum; }
inline Floats to_floats(Words integer) { return static_cast<float>(integer); }
inline Floats as_floats(Words bits) { return std::bit_cast<float>(bits); }
inline Words both(Words a, Words b) { return a & b; }
template <int Bits>
inline Words up(Words word) {
  return static_cast<int32_t>(static_cast<uint32_t>(word) << Bits);
}
template <int Bits>
inline Words down(Words word) {
  return static_cast<int32_t>(static_cast<uint32_t>(word) >> Bits);
}
template <int Bits>
inline Words down_signed(Words word) {
  return word >> Bits;
}
inline Words load_halves_up(const uint16_t* from) { return static_cast<int32_t>(uint32_t{*from} << 16); }
inline Words masked_flipped(Words word, Words mask, Words flipped) { return (word & mask) ^ flipped; }
inline Words dot(Words sum, Words nibbles, const void* word) {
  for (int i = 0; i < 4; ++i) sum += (nibbles >> 8 * i & 15) * static_cast<const int8_t*>(word)[i];
  return sum;
}

struct Table16 {
  explicit Table16(const float* values) : all(values) {}
  Floats operator[](Words code) const { return all[code & 15]; }
  const float* all;
};

#endif

// The scales of kVectorWords channels of a panel from `first` on, for one group.
inline Floats load_scales(const void* of_group, bool bf16, int64_t first) {
  if (bf16) return as_floats(load_halves_up(static_cast<const uint16_t*>(of_group) + first));
  return load_floats(static_cast<const float*>(of_group) + first);
}

}  // namespace
