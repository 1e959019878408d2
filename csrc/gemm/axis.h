// The axes of a matrix, and the room that it takes packed.
#pragma once
#include <cstdint>

namespace rmc {

// An axis and its padded form: index[i] is the true position of padded position i, or -1; mask[i], of the plan's scalar
// type, has all bits set or (padding) none. The mask is null without padding, which only ends a vector of W.
struct Axis {
  int64_t size = 0, padded = 0;
  const int32_t* index = nullptr;
  const void* mask = nullptr;
};

// Elements that a packed matrix takes, for padded axes. Split into bf16 terms it starts with a line of its own and has
// an even number of chunks along `in`.
inline int64_t packed_size(int terms, int64_t in, int64_t out) {
  return terms ? 16 + (in + 31) / 32 * 32 * out * terms / 2 : in * out;
}

}  // namespace rmc
