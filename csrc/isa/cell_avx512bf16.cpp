#define RMC_ISA avx512bf16
#define RMC_SIMD "simd/avx512.h"
#define RMC_PRODUCT "gemm/bf16_product.h"
// GCC 12's own intrinsics start from a value that they leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "cell/hook_table.h"
#include "cell/table.h"
#include "gemm/tile_gemm.h"
#include "gemm/tile_gradient.h"

namespace rmc {

const Kernels& kernels_avx512bf16() {
  static constexpr Kernels kernels = avx512bf16::table<avx512bf16::Vector16<1>>();
  return kernels;
}

}  // namespace rmc
