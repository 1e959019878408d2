#define RMC_ISA neon
#define RMC_SIMD "simd/neon.h"
#include "cell/hook_table.h"
#include "cell/table.h"

namespace rmc {

const Kernels& kernels_neon() {
  static constexpr Kernels kernels = neon::table<neon::Simd>();
  return kernels;
}

const Hooks& hooks_neon() {
  static constexpr Hooks hooks = neon::hook_table<neon::Simd>();
  return hooks;
}

}  // namespace rmc
