// weight_gradient() on tiles: k counts rows here, and a pair of k is the same row of two neighbouring panels.
#pragma once
#include <cstring>

#include "gemm/product.h"
#include "gemm/tiles.h"
#include "gemm/weight_gradient.h"

namespace rmc {
namespace RMC_ISA {

constexpr int64_t kGradientPanels = 16;  // whose products are summed before they are added

// Panels p and p + 1 of 16 columns as the operand tiles of one tile of k; rows that are not there count as zeros. A
// right operand has the rows as its words, a left one the columns as its rows.
template <class V, bool kLeft>
inline __m512 split_panels(const Panels<V>& x, int64_t p, int64_t end, int64_t column, uint32_t* to) {
  const float *even = x.panel(p) + column * x.height, *odd = even + x.stride();
  const int64_t n = x.in_panel(p), m = p + 1 < end ? x.in_panel(p + 1) : 0;
  __m512 left = _mm512_setzero_ps();
  V a[16], b[16];
  for (int i = 0; i < 16; i++) {
    a[i] = i < n ? V::load(even + i * 16) : V::zero();
    b[i] = i < m ? V::load(odd + i * 16) : V::zero();
  }
  if constexpr (kLeft) V::transpose(a), V::transpose(b);
  for (int i = 0; i < 16; i++) left = _mm512_add_ps(left, store_pairs<V::kTerms>(a[i].v, b[i].v, to + i * 16));
  return left;
}

template <class V, int R, int C>
void gradient_block(const TileProduct& product, int64_t depth, const uint32_t* a, const uint32_t* b, int64_t next,
                    float* out, int64_t stride) {
  alignas(64) float sums[4 * 256];
  for (int r = 0; r < 16 * R; r++) {
    for (int j = 0; j < C; j++) prefetch(out + r * stride + j * 16);
  }
  product.multiply<V::kTerms, R, C>(depth, a, next, b, next, {}, sums);
  for (int r = 0; r < 16 * R; r++) {
    for (int j = 0; j < C; j++) {
      float* to = out + r * stride + j * 16;
      (V::load(to) + V::load(sums + (r / 16 * 2 + j) * 256 + r % 16 * 16)).store(to);
    }
  }
}

// Columns of x as operands, one after the other; true where all could be split.
template <class V, bool kLeft>
bool split_columns(const Panels<V>& x, int64_t first, int64_t end, int64_t panels, uint32_t* to) {
  __m512 left = _mm512_setzero_ps();
  for (int64_t c = first; c < end; c += 16) {
    for (int64_t p = 0; p < panels; p += 2, to += V::kTerms * kTileWords)
      left = _mm512_add_ps(left, split_panels<V, kLeft>(x, p, panels, c, to));
  }
  return !has_nan(left);
}

// Columns that cannot be split are left to the vector units.
template <class V>
void tile_weight_gradient(const Panels<V>& dy, const Panels<V>& x, int64_t panels, float* out) {
  using Block = void (*)(const TileProduct&, int64_t, const uint32_t*, const uint32_t*, int64_t, float*, int64_t);
  static constexpr Block kBlocks[2][2] = {{gradient_block<V, 1, 1>, gradient_block<V, 1, 2>},
                                          {gradient_block<V, 2, 1>, gradient_block<V, 2, 2>}};
  constexpr int64_t kStep = V::kTerms * kTileWords, kBlock = kGradientPanels / 2;
  const int64_t depth = (panels + 1) / 2, next = depth * kStep;
  const size_t words = static_cast<size_t>((x.columns / 16 + 2) * next);
  const TaskScratch memory(TaskScratch::kOperands, words * sizeof(uint32_t));
  uint32_t* left = memory.as<uint32_t>();
  uint32_t* right = left + 2 * next;
  if (!split_columns<V, false>(x, 0, x.columns, panels, right))
    return vector_weight_gradient(dy, 0, dy.columns, x, panels, out);
  const TileProduct product(16);
  for (int64_t o = 0; o < dy.columns; o += 32) {
    const int64_t end = o + 32 < dy.columns ? o + 32 : dy.columns;
    if (!split_columns<V, true>(dy, o, end, panels, left)) {
      vector_weight_gradient(dy, o, end, x, panels, out);
      continue;
    }
    for (int64_t k = 0; k < depth; k += kBlock) {
      const int64_t count = depth - k < kBlock ? depth - k : kBlock;
      for (int64_t i = 0; i < x.columns; i += 32) {
        kBlocks[end - o == 32][i + 32 <= x.columns](product, count, left + k * kStep, right + i / 16 * next + k * kStep,
                                                    next, out + o * x.columns + i, x.columns);
      }
    }
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
