#include "cell/kernels.h"

#include <stdexcept>

namespace rmc {

const Kernels& kernels(Isa isa, bool is_double) {
  if (is_double) {
    if (isa != Isa::kGeneric) throw std::invalid_argument("isa: float64 runs in the generic build only");
    return kernels_generic_double();
  }
  switch (isa) {
    case Isa::kGeneric:
      return kernels_generic();
    case Isa::kAvx2:
#ifdef RMC_HAVE_AVX2
      return kernels_avx2();
#endif
      break;
    case Isa::kAvx512:
#ifdef RMC_HAVE_AVX512
      return kernels_avx512();
#endif
      break;
    case Isa::kAmx:
#ifdef RMC_HAVE_AMX
      return kernels_amx();
#endif
      break;
  }
  throw std::invalid_argument("isa: this build has no kernels for it");
}

}  // namespace rmc
