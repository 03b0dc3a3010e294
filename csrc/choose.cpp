// The only place that decides which instruction set runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace fewbits {
namespace {

#if defined(__x86_64__)
// GCC and Clang also ask the operating system whether it saves the wide registers.
bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2");
}
#endif

Choice choose() {
  const char* wish = std::getenv("FEWBITS_ISA");
  const std::string forced = wish ? wish : "";
  if (forced == "scalar") return {&kScalar, "forced by FEWBITS_ISA"};
#if defined(__x86_64__)
  if ((forced == "avx512" && !has_avx512()) || (forced == "avx2" && !has_avx2()))
    throw std::runtime_error("FEWBITS_ISA=" + forced + ": this CPU does not have it; unset it or use scalar");
  if (forced == "avx512") return {&kAvx512, "forced by FEWBITS_ISA"};
  if (forced == "avx2") return {&kAvx2, "forced by FEWBITS_ISA"};
#endif
  if (!forced.empty())
    throw std::runtime_error("FEWBITS_ISA=" + forced + ": not one of scalar, avx2, avx512 on this machine; unset it");
#if defined(__x86_64__)
  if (has_avx512()) return {&kAvx512, "the widest this CPU has"};
  if (has_avx2()) return {&kAvx2, "the CPU has no AVX-512 VNNI"};
#endif
  return {&kScalar, "the CPU has neither AVX2 nor AVX-512 VNNI"};
}

}  // namespace

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace fewbits
