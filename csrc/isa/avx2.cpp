#include "table.hpp"

constinit const fewbits::Kernels fewbits::kAvx2 = table("avx2");
