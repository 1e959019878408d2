// Working memory that a thread keeps between calls, so that a call does not pay for fresh pages.
#pragma once
#include <cstddef>
#include <cstdint>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace rmc {

enum class Scratch { kTask, kWeights, kGradients, kOperands };

// At least `bytes`, aligned to a cache line, contents unspecified (NaN in builds with assertions). Valid until the next
// call for the same `use` on this thread or release_scratch(). Throws std::bad_alloc.
void* scratch(Scratch use, size_t bytes);

// Asks for the whole huge pages inside to be huge where they are touched for the first time. No more than a wish.
void prefer_huge_pages(void* data, size_t bytes);

// Gives back what is larger than a thread may keep.
void release_scratch();

// Sets this thread's scratch memory aside while it lives: for foreign code in the middle of a call, which may call in
// turn.
class FreshScratch {
 public:
  FreshScratch();
  ~FreshScratch();
  FreshScratch(const FreshScratch&) = delete;
  FreshScratch& operator=(const FreshScratch&) = delete;

 private:
  struct Held {
    void* data;
    size_t size;
  } held_[4];
};

// Hands out consecutive, cache-line aligned pieces of a buffer; with a null buffer it only adds up their sizes. Under
// the address sanitizer what lies between them, and a line more, may not be touched.
class Bump {
 public:
  explicit Bump(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_, bytes = static_cast<size_t>(count) * sizeof(T);
    used_ += (bytes + 63) / 64 * 64 + kRedZone;
    if (!base_) return nullptr;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(base_ + at, bytes);
    ASAN_POISON_MEMORY_REGION(base_ + at + bytes, used_ - at - bytes);
#endif
    return reinterpret_cast<T*>(base_ + at);
  }
  size_t used() const { return used_; }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kRedZone = 64;
#else
  static constexpr size_t kRedZone = 0;
#endif
  char* base_;
  size_t used_ = 0;
};

}  // namespace rmc
