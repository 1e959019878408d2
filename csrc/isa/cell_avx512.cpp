#define RMC_ISA avx512
// GCC 12's own intrinsics start from a value that they leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "simd/avx512.h"
// The width comes first: what follows is compiled for it.
#include "cell/table.h"

namespace rmc {

const Kernels& kernels_avx512() {
  static constexpr Kernels kernels = avx512::table<avx512::Vector16<0>>();
  return kernels;
}

}  // namespace rmc
