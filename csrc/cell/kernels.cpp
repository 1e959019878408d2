#include "cell/kernels.h"

#include <stdexcept>

#include "cell/hooks.h"
#include "cell/plan.h"

namespace rmc {
namespace {

// The float32 tables of an instruction set.
struct Tables {
  const Kernels& (*kernels)();
  const Hooks& (*hooks)();
};

Tables tables(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return {kernels_generic, hooks_generic};
    case Isa::kNeon:
#ifdef RMC_HAVE_NEON
      return {kernels_neon, hooks_neon};
#endif
      break;
    case Isa::kAvx2:
#ifdef RMC_HAVE_AVX2
      return {kernels_avx2, hooks_avx2};
#endif
      break;
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:  // more than AVX-512 for bfloat16 only
#ifdef RMC_HAVE_AVX512
      return {kernels_avx512, hooks_avx512};
#endif
      break;
    case Isa::kAmx:
#ifdef RMC_HAVE_AMX
      return {kernels_amx, hooks_amx};
#endif
      break;
  }
  throw std::invalid_argument("isa: this build has no kernels for it");
}

}  // namespace

const Kernels& kernels(Isa isa, Precision precision) {
  if (precision == Precision::kFloat64) {
    if (isa != Isa::kGeneric) throw std::invalid_argument("isa: float64 runs in the generic build only");
    return kernels_generic_double();
  }
  if (precision == Precision::kBfloat16) {
#ifdef RMC_HAVE_AMX
    if (isa == Isa::kAmx) return kernels_amx_bfloat16();
#endif
#ifdef RMC_HAVE_AVX512BF16
    if (isa == Isa::kAvx512Bf16) return kernels_avx512bf16();
#endif
    throw std::invalid_argument("isa: bfloat16 products are those of avx512bf16 and amx");
  }
  return tables(isa).kernels();
}

const Hooks& hooks(Isa isa) { return tables(isa).hooks(); }

}  // namespace rmc
