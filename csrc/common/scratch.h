// Working memory with one owner each: a call owns what all of its tasks read, a task owns its tile. Memory goes back
// when its owner ends and no other way, so that no task can give up memory of its call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace rmc {

// At least `size` bytes, aligned to a cache line, contents unspecified (NaN in builds with assertions). A thread keeps
// one block of each kind of owner between calls, so that a call does not pay for fresh pages; a call in the middle of
// another, which a signal's handler may make, finds none and allocates. Throws std::bad_alloc.
class ScratchBlock {
 public:
  ScratchBlock(const ScratchBlock&) = delete;
  ScratchBlock& operator=(const ScratchBlock&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t size() const { return size_; }

 protected:
  ScratchBlock(int kind, size_t size);
  ~ScratchBlock();

 private:
  const int kind_;
  const size_t size_;
  size_t capacity_ = 0;
  void* data_ = nullptr;
};

// What every task of a call may read or add to. Made before the tasks start, ends after the last of them.
class CallScratch : public ScratchBlock {
 public:
  enum Kind { kWeights, kGradients };
  CallScratch(Kind kind, size_t size) : ScratchBlock(kind, size) {}
};

// What one task works in.
class TaskScratch : public ScratchBlock {
 public:
  enum Kind { kTile = CallScratch::kGradients + 1, kOperands };
  TaskScratch(Kind kind, size_t size) : ScratchBlock(kind, size) {}
};

// Asks for the whole huge pages inside to be huge where they are touched for the first time. No more than a wish.
void prefer_huge_pages(void* data, size_t size);

// Hands out consecutive, cache-line aligned parts of a block; without one it only adds up their sizes. A copy hands out
// the parts from there on once more. Under the address sanitizer what lies between parts, and a line more, may not be
// touched.
class Bump {
 public:
  Bump() = default;
  Bump(void* base, size_t size) : base_(static_cast<char*>(base)), size_(size) {}
  explicit Bump(const ScratchBlock& block) : Bump(block.as<char>(), block.size()) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_, bytes = static_cast<size_t>(count) * sizeof(T);
    used_ += (bytes + 63) / 64 * 64 + kRedZone;
    if (!base_) return nullptr;
    if (used_ > size_) throw std::logic_error("scratch memory: more is taken than was measured");
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
  char* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// The bytes that `bind(bump)` takes.
template <class Bind>
size_t measured(Bind&& bind) {
  Bump bump;
  bind(bump);
  return bump.used();
}

}  // namespace rmc
