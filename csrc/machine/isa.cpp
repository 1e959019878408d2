#include "machine/isa.h"

#include <stdexcept>

#include "machine/features.h"

namespace rmc {
namespace {

constexpr Isa kAll[] = {Isa::kGeneric, Isa::kNeon, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

bool compiled(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kNeon:
#ifdef RMC_HAVE_NEON
      return true;
#endif
      break;
    case Isa::kAvx2:
#ifdef RMC_HAVE_AVX2
      return true;
#endif
      break;
    case Isa::kAvx512:
#ifdef RMC_HAVE_AVX512
      return true;
#endif
      break;
    case Isa::kAvx512Bf16:
#ifdef RMC_HAVE_AVX512BF16
      return true;
#endif
      break;
    case Isa::kAmx:
#ifdef RMC_HAVE_AMX
      return true;
#endif
      break;
  }
  return false;
}

bool executable(Isa isa) {
  const CpuFeatures& f = cpu_features();
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512 = avx2 && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl;
  const bool avx512bf16 = avx512 && f.avx512_bf16;
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kNeon:
      return f.neon;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512bf16;
    case Isa::kAmx:
      return avx512bf16 && f.amx_tile && f.amx_bf16;
  }
  return false;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return "generic";
    case Isa::kNeon:
      return "neon";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

bool supported(Isa isa) { return compiled(isa) && executable(isa); }

std::vector<Isa> supported_isas() {
  std::vector<Isa> out;
  for (Isa isa : kAll) {
    if (supported(isa)) out.push_back(isa);
  }
  return out;
}

Isa parse_isa(const std::string& text) {
  std::string choices;
  for (Isa isa : supported_isas()) {
    if (text == name(isa)) return isa;
    choices += choices.empty() ? "" : ", ";
    choices += name(isa);
  }
  throw std::invalid_argument("isa: got '" + text + "', this machine and build support " + choices);
}

}  // namespace rmc
