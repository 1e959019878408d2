#define RMC_ISA generic
#define RMC_SIMD "simd/generic.h"
#include "cell/hook_table.h"
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

const Hooks& hooks_generic() {
  static constexpr Hooks hooks = generic::hook_table<generic::Vector<float>>();
  return hooks;
}

}  // namespace rmc
