#include "common/scratch.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace rmc {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kKeep = size_t{64} << 20;  // bytes that one use may keep between calls

struct Buffer {
  void* data = nullptr;
  size_t size = 0;

  void* need(size_t bytes) {
    if (bytes > size) {
      reset();
      const size_t unit = bytes >= kHugePage ? kHugePage : kPage;
      const size_t rounded = (bytes + unit - 1) / unit * unit;
      data = std::aligned_alloc(unit, rounded);
      if (!data) throw std::bad_alloc();
      size = rounded;
      prefer_huge_pages(data, rounded);
    }
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(data, size);  // where the call before had red zones
#endif
#ifndef NDEBUG
    std::memset(data, 0xff, bytes);  // every float and double of all ones is a NaN
#endif
    return data;
  }
  void reset() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
  ~Buffer() { reset(); }
};

thread_local Buffer buffers[4];

}  // namespace

void* scratch(Scratch use, size_t bytes) { return buffers[static_cast<int>(use)].need(bytes); }

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

FreshScratch::FreshScratch() {
  for (int i = 0; i < 4; i++) {
    held_[i] = {buffers[i].data, buffers[i].size};
    buffers[i].data = nullptr, buffers[i].size = 0;
  }
}

FreshScratch::~FreshScratch() {
  for (int i = 0; i < 4; i++) {
    buffers[i].reset();
    buffers[i].data = held_[i].data, buffers[i].size = held_[i].size;
  }
}

void release_scratch() {
  for (Buffer& buffer : buffers) {
    if (buffer.size > kKeep) buffer.reset();
  }
}

}  // namespace rmc
