#define RMC_ISA avx2
#define RMC_SIMD "simd/avx2.h"
#include "cell/hook_table.h"
#include "cell/table.h"

namespace rmc {

const Kernels& kernels_avx2() {
  static constexpr Kernels kernels = avx2::table<avx2::Simd>();
  return kernels;
}

const Hooks& hooks_avx2() {
  static constexpr Hooks hooks = avx2::hook_table<avx2::Simd>();
  return hooks;
}

}  // namespace rmc
