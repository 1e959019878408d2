#define RMC_ISA avx512
#define RMC_SIMD "simd/avx512.h"
// GCC 12's own intrinsics start from a value that they leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "cell/hook_table.h"
#include "cell/table.h"

namespace rmc {

const Kernels& kernels_avx512() {
  static constexpr Kernels kernels = avx512::table<avx512::Vector16<0>>();
  return kernels;
}

const Hooks& hooks_avx512() {
  static constexpr Hooks hooks = avx512::hook_table<avx512::Vector16<0>>();
  return hooks;
}

}  // namespace rmc
