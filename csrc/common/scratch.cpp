#include "common/scratch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace rmc {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
#ifdef RMC_SANITIZE
constexpr size_t kKeep = 0;  // a sanitizer sees what is read too late only in memory that was given back
#else
constexpr size_t kKeep = size_t{64} << 20;  // bytes of a block that a thread may keep between calls
#endif
constexpr int kKinds = TaskScratch::kOperands + 1;

// A block without an owner.
struct Spare {
  void* data = nullptr;
  size_t capacity = 0;

  void keep(void* block, size_t size) {
    std::free(std::exchange(data, block));
    capacity = size;
  }
  ~Spare() { std::free(data); }
};

thread_local Spare spares[kKinds];

}  // namespace

ScratchBlock::ScratchBlock(int kind, size_t size) : kind_(kind), size_(size) {
  if (!size) return;
  Spare& spare = spares[kind];
  if (spare.capacity >= size) {
    data_ = std::exchange(spare.data, nullptr);
    capacity_ = std::exchange(spare.capacity, 0);
  } else {
    spare.keep(nullptr, 0);
    const size_t unit = size >= kHugePage ? kHugePage : kPage;
    capacity_ = (size + unit - 1) / unit * unit;
    data_ = capacity_ < size ? nullptr : std::aligned_alloc(unit, capacity_);
    if (!data_) throw std::bad_alloc();
    prefer_huge_pages(data_, capacity_);
  }
#ifndef NDEBUG
  std::memset(data_, 0xff, size);  // every float and double of all ones is a NaN
#endif
}

ScratchBlock::~ScratchBlock() {
  Spare& spare = spares[kind_];
  if (capacity_ <= kKeep && capacity_ > spare.capacity) {
    spare.keep(data_, capacity_);
  } else {
    std::free(data_);
  }
}

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t size) {
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + size) / kHugePage * kHugePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace rmc
