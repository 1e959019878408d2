#define RMC_ISA amx
#define RMC_SIMD "simd/avx512.h"
#define RMC_PRODUCT "gemm/amx_product.h"
// GCC 12's own intrinsics start from a value that they leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "cell/hook_table.h"
#include "cell/table.h"
#include "gemm/tile_gemm.h"
#include "gemm/tile_gradient.h"

namespace rmc {

const Kernels& kernels_amx() {
  static constexpr Kernels kernels = amx::table<amx::Vector16<3>>();
  return kernels;
}

const Kernels& kernels_amx_bfloat16() {
  static constexpr Kernels kernels = amx::table<amx::Vector16<1>>();
  return kernels;
}

const Hooks& hooks_amx() {
  static constexpr Hooks hooks = amx::hook_table<amx::Vector16<3>>();
  return hooks;
}

}  // namespace rmc
