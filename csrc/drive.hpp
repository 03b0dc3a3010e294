// Whole ops: the work of one call, split over threads.
#pragma once

#include "kernels.hpp"

namespace fewbits {

void quantize_per_token(const float* x, int64_t M, int64_t K, int8_t* codes, float* scales, int threads);
void int8_matmul(Int8Matmul job, int threads);  // job.tiles is allocated here

}  // namespace fewbits
