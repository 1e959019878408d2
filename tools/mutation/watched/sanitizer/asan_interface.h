// In place of the sanitizer's: what csrc/common/bump.cpp says may not be touched is watched by watched/scratch.cpp, in
// code that no sanitizer was built into.
#pragma once
#include <cstddef>

namespace rmc {
void watch(void* data, size_t bytes);
void give_up_watching(void* data, size_t bytes);
}  // namespace rmc

#define ASAN_POISON_MEMORY_REGION(data, bytes) ::rmc::watch(data, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes) ::rmc::give_up_watching(data, bytes)
