// Which instructions this process may execute: the CPU has them AND the operating system saves their registers.
#pragma once
#include <utility>
#include <vector>

namespace rmc {

struct CpuFeatures {
  bool neon = false;
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512dq = false;
  bool avx512vl = false;
  bool avx512_bf16 = false;
  bool avx512_fp16 = false;
  bool amx_tile = false;
  bool amx_bf16 = false;

  std::vector<std::pair<const char*, bool>> items() const;
};

// Detected once. The first call asks Linux for permission to use the AMX tiles; without it they are reported absent.
const CpuFeatures& cpu_features();

}  // namespace rmc
