#define RMC_ISA amx
// GCC 12's own intrinsics start from a value that they leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "simd/avx512.h"
// The width and the product come first: what follows is compiled for them.
#include "cell/table.h"
#include "gemm/amx_product.h"
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

}  // namespace rmc
