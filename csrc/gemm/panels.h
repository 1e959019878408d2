// The layout of every matrix inside the cell: panels of `height` rows, each in chunks of W columns,
//     element (r, c) at  panel(r / height) + (c / W) * height * W + (r % height) * W + c % W.
// What a GEMM kernel touches is then base + constant (no row strides), and its result is directly the operand of the
// next. Panels are some cache lines further apart than their size: otherwise the same columns of all panels (what a
// weight gradient reads) share a few sets of the L1 cache. Half the height was best of the simple rules: at most 10
// lines in a set for all heights and widths in use, against 16 with one line, where weight gradients ran at a third.
#pragma once
#include <cstdint>

#include "common/bump.h"
#include "simd/vectors.h"

namespace rmc {
namespace RMC_ISA {

// Where the rows of a step are: `rows` of them in `count` panels, the last of which may be partly filled.
struct Rows {
  int64_t rows = 0, count = 0;
  int32_t height = 1;

  int64_t in_panel(int64_t p) const {  // p counts through several steps
    const int64_t q = p % count;
    return q + 1 < count ? height : rows - q * height;
  }
};

// The rows of one or several steps.
template <class V>
struct Panels : Rows {
  using T = typename V::T;
  T* data = nullptr;
  int64_t columns = 0;

  Panels() = default;
  Panels(Bump& bump, const Rows& step, int64_t width, int64_t steps = 1) : Rows(step), columns(width) {
    data = bump.take<T>(steps * count * stride());
  }

  static constexpr int64_t kLine = 64 / sizeof(T);
  int64_t stride() const { return columns * height + (height > 1 ? height / 2 : 1) * kLine; }
  int64_t chunk_stride() const { return int64_t{height} * V::W; }
  T* panel(int64_t p) const { return data + p * stride(); }
  // First chunk of row r, counted from panel p.
  T* row(int64_t p, int64_t r) const {
    const uint32_t q = static_cast<uint32_t>(r) / static_cast<uint32_t>(height);
    return data + (p + q) * stride() + (r - int64_t{q} * height) * V::W;
  }
  explicit operator bool() const { return data != nullptr; }
};

// x, the columns from `column` on of an axis whose mask that is (cell/plan.h; null: no padding), with zeros in the
// padding, whatever is there.
template <class V>
inline V without_padding(V x, const typename V::T* mask, int64_t column) {
  return mask ? x & V::load(mask + column) : x;
}

}  // namespace RMC_ISA
}  // namespace rmc
