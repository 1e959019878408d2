// Working memory with one owner each: a call owns what all of its tasks read, a task owns its tile. Memory goes back
// when its owner ends and no other way, so that no task can give up memory of its call.
#pragma once
#include <cstddef>
#include <cstdint>

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

}  // namespace rmc
