#include "table.hpp"

constinit const fewbits::Kernels fewbits::kAvx512 = table("avx512");
