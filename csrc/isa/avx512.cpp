#include "../cast.hpp"
#include "../int8_matmul.hpp"
#include "../quantize_per_token.hpp"

const fewbits::Kernels fewbits::kAvx512 = {"avx512",      quantize_per_token, int8_pack_rows, int8_matmul,
                                           encode_floats, decode_codes,       stream_out};
