#include "cast_avx512.hpp"
#include "table.hpp"

constinit const fewbits::Kernels fewbits::kAvx512 = with_avx512(table("avx512"));
