// Whole ops: the work of one call, split over threads.
#pragma once

#include "kernels.hpp"

namespace fewbits {

// How many threads are worth waking for so many multiply-adds, or bytes moved.
int useful_threads(int64_t work, int threads);

void quantize_per_token(const float* x, int64_t M, int64_t K, int8_t* codes, float* scales, int threads);
void rotate(const float* x, int64_t M, int64_t K, int64_t block, float* out, int threads);
bool quantize_weight(const WeightJob& job, int threads);
void pack_int8(const int8_t* weight, int64_t N, int64_t K, int8_t* packed, int threads);
void int8_matmul(Int8Matmul job, int threads);  // job.tiles is allocated here
void int8_linear(const float* x, const int8_t* packed, const float* channel_scales, const float* bias, float* out,
                 int64_t M, int64_t N, int64_t K, int threads);
void int8_linear_two_digits(const float* x, const int8_t* packed, const float* channel_scales, const float* bias,
                            float* out, int64_t M, int64_t N, int64_t K, int threads);

// x [M, K] by a weight in panels of 4 or 8 bits, of any kind: out [M, N].
void panel_linear(const float* x, const Weight& weight, float* out, int64_t M, int threads);

// x is float32, or 16-bit floats of the format `source`; results are float32, or narrowed to 16 bits by `narrow`.
// `fresh` memory was never written: its pages come from the system as they are touched, and are in the caches then.
// With `nibbles` two codes of 4 bits share a byte, and count is even.
void encode(const void* x, const Codec* source, int64_t count, const Rounder& rounder, bool nibbles, bool fresh,
            void* codes, int threads);
// decode returns the bits that any code has: 2^bits or more means that one was out of range.
int32_t decode(const void* codes, const Codec& codec, int64_t count, bool nibbles, const Rounder* narrow, bool fresh,
               void* out, int threads);
void round(const void* x, const Codec* source, int64_t count, const Rounder& rounder, const Rounder* narrow, bool fresh,
           void* out, int threads);

// x [M, K] -> codes [M, K], scales [M, ceil(K / size)].
void mx_encode(const float* x, int64_t M, int64_t K, const MxFormat& format, uint8_t* codes, uint8_t* scales,
               int threads);
void nvfp4_encode(const float* x, int64_t M, int64_t K, Nvfp4Format format, uint8_t* codes, uint8_t* scales,
                  int threads);
float finite_amax(const float* x, int64_t count, int threads);

// A codec with the table of its values, for Kernels::decode.
Decoding decoding_of(const Codec& codec);

// One optimizer step of `count` parameters; of each gradient: Inf, NaN, largest finite magnitude, sum of squares.
void adamw(const AdamwTensor* tensors, const AdamwCoefficients* coefficients, int64_t count,
           const AdamwFormats& formats, int threads);
void gradient_stats(const GradientTensor* tensors, int64_t count, const AdamwFormats& formats, double* out,
                    int threads);

}  // namespace fewbits
