// A number format and a rounding as plain numbers, made from fewbits.formats in Python; no format is named in C++.
#pragma once

#include <cstdint>

namespace fewbits {

// Formats of at most 16 bits. A code is a sign and a magnitude code, or two's complement; a magnitude code is an
// exponent field over a mantissa field, so that the next larger magnitude has the next larger code.
struct Codec {
  enum Sign : int32_t { kMagnitude, kTwosComplement, kUnsigned };

  int32_t sign;            // how negative numbers are coded
  int32_t bits;            // of a code, 2 … 16
  int32_t mantissa_bits;   // without the implicit one
  int32_t emin;            // exponent of the smallest normal value
  int32_t has_subnormals;  // else exponent field 0 is an ordinary exponent, and there is no zero
  int32_t max_code;        // magnitude code of the largest value
  int32_t max_negative;    // the same for negative values
  int32_t inf_code;        // magnitude code of Inf, or -1
  int32_t nan_code;        // what a NaN becomes, sign included
  int32_t nan_above;       // larger magnitude codes are NaN; or none is: 1 << 16
  int32_t nan_exactly;     // the one code that is NaN, or -1
  int32_t signed_from;     // smallest magnitude code that may be negative: 0, or 1 where there is no -0
  int32_t never_signed;    // a magnitude code that takes no sign (the NaN that overflow gives), or -1
  int32_t negative_code;   // unsigned formats: what negative numbers become

  int32_t code_bytes() const { return bits <= 8 ? 1 : 2; }
};

// A codec, and the upper halves of the values of all bytes, where codes have at most 8 bits: they have no more than 8
// significant bits, so the lower halves are zero.
struct Decoding {
  const Codec& codec;
  uint16_t upper_halves[256];
};

enum Rounding : int32_t { kNearestEven, kNearestAway, kTowardZero, kUp, kDown, kStochastic };

struct Rounder {
  Codec codec;
  int32_t rounding;
  int32_t over[2];  // magnitude codes of values beyond the range: positive, negative
  int32_t inf[2];   // and of Inf
  uint64_t key;     // of the random words
};

// OCP MX: a power-of-two scale, 2^(code - 127), to `size` elements.
struct MxFormat {
  Rounder element;
  int32_t size;
  int32_t emax;            // exponent of the largest element value
  int64_t round_up_above;  // the scale is doubled where amax = 2^e · (1 + fraction / 2^52) has a larger fraction
  int32_t nan_scale;       // scale code of a block with NaN or Inf
};

// NVFP4: an E4M3 scale to `size` E2M1 elements, and one scale of the tensor.
struct Nvfp4Format {
  Rounder element;
  Codec scale;
  int32_t size;
  double element_max;
  double tensor_scale;
  double bounds[7];              // the middles between neighbouring element values
  int32_t boundaries[128][8]{};  // by scale code: the bits of the first magnitude that passes each of them
};

// An element's random word depends on the key and its position alone: the same bits for any thread count.
// lowbias32 by Christopher Wellons, with a second key between its two rounds.
inline uint32_t random_word(uint32_t word, uint32_t key) {
  word ^= word >> 16;
  word *= 0x7FEB352Du;
  word ^= (word >> 15) ^ key;
  word *= 0x846CA68Bu;
  return word ^ (word >> 16);
}

}  // namespace fewbits
