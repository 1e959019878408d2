#include "machine/features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace rmc {

#if defined(__x86_64__)
namespace {

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(unsigned leaf, unsigned subleaf) {
  Leaf out;
  __get_cpuid_count(leaf, subleaf, &out.eax, &out.ebx, &out.ecx, &out.edx);  // leaves zeros where the leaf is absent
  return out;
}

constexpr bool bit(uint64_t word, int index) { return (word >> index) & 1; }

// XCR0: the register sets that the operating system saves on a context switch.
uint64_t enabled_state() {
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool request_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, missing from older kernel headers
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures f;
  const Leaf basic = cpuid(1, 0);
  if (!bit(basic.ecx, 27)) return f;  // no xgetbv

  const uint64_t state = enabled_state();
  const Leaf extended = cpuid(7, 0);
  const Leaf more = cpuid(7, 1);

  constexpr uint64_t kVectors = 0x6, kMasksAndWideVectors = 0xe6, kTiles = 0x60000;
  if ((state & kVectors) == kVectors) {
    f.avx2 = bit(extended.ebx, 5);
    f.fma = bit(basic.ecx, 12);
    f.f16c = bit(basic.ecx, 29);
  }
  if ((state & kMasksAndWideVectors) == kMasksAndWideVectors) {
    f.avx512f = bit(extended.ebx, 16);
    f.avx512dq = bit(extended.ebx, 17);
    f.avx512bw = bit(extended.ebx, 30);
    f.avx512vl = bit(extended.ebx, 31);
    f.avx512_fp16 = bit(extended.edx, 23);
    f.avx512_bf16 = bit(more.eax, 5);
  }
  if ((state & kTiles) == kTiles && bit(extended.edx, 24) && request_amx()) {
    f.amx_tile = true;
    f.amx_bf16 = bit(extended.edx, 22);
  }
  return f;
}

}  // namespace
#else
static CpuFeatures detect() {
  CpuFeatures f;
#if defined(__aarch64__)
  f.neon = true;
#endif
  return f;
}
#endif

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::vector<std::pair<const char*, bool>> CpuFeatures::items() const {
  return {
      {"neon", neon},
      {"avx2", avx2},
      {"fma", fma},
      {"f16c", f16c},
      {"avx512f", avx512f},
      {"avx512bw", avx512bw},
      {"avx512dq", avx512dq},
      {"avx512vl", avx512vl},
      {"avx512_bf16", avx512_bf16},
      {"avx512_fp16", avx512_fp16},
      {"amx_tile", amx_tile},
      {"amx_bf16", amx_bf16},
  };
}

}  // namespace rmc
