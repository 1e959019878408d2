#define RMC_ISA generic
#include "simd/generic.h"
// The width comes first: what follows is compiled for it.
#include "cell/table.h"

namespace rmc {

const Kernels& kernels_generic() {
  static constexpr Kernels kernels = generic::table<generic::Vector<float>>();
  return kernels;
}

const Kernels& kernels_generic_double() {
  static constexpr Kernels kernels = generic::table<generic::Vector<double>>();
  return kernels;
}

}  // namespace rmc
