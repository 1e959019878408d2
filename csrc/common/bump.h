// Parts of a block of scratch memory.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/scratch.h"

namespace rmc {

// Hands out consecutive, cache-line aligned parts of a block; without one it only adds up their sizes. A copy hands out
// the parts from there on once more. Under the address sanitizer what lies between parts, and a line more, may not be
// touched.
class Bump {
 public:
  Bump() = default;
  Bump(void* base, size_t size) : base_(static_cast<char*>(base)), size_(size) {}
  explicit Bump(const ScratchBlock& block) : Bump(block.as<char>(), block.size()) {}

  // Throws std::logic_error past the end of the block, that is where more is taken than was measured.
  template <class T>
  [[gnu::always_inline]] T* take(int64_t count) {  // inline: no function for one instruction set that another may call
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  size_t used() const { return used_; }

 private:
  void* take_bytes(size_t bytes);

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
