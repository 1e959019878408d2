#include "common/bump.h"

#include <stdexcept>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace rmc {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kRedZone = 64;
#else
constexpr size_t kRedZone = 0;
#endif

}  // namespace

void* Bump::take_bytes(size_t bytes) {
  const size_t at = used_;
  used_ += (bytes + 63) / 64 * 64 + kRedZone;
  if (!base_) return nullptr;
  if (used_ > size_) throw std::logic_error("scratch memory: more is taken than was measured");
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(base_ + at, bytes);
  ASAN_POISON_MEMORY_REGION(base_ + at + bytes, used_ - at - bytes);
#endif
  return base_ + at;
}

}  // namespace rmc
