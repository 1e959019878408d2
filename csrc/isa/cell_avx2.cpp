#define RMC_ISA avx2
#include "simd/avx2.h"
// The width comes first: what follows is compiled for it.
#include "cell/table.h"

namespace rmc {

const Kernels& kernels_avx2() {
  static constexpr Kernels kernels = avx2::table<avx2::Simd>();
  return kernels;
}

}  // namespace rmc
