#include "table.hpp"

constinit const fewbits::Kernels fewbits::kScalar = table("scalar");
