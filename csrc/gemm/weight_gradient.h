// dW += dY^T X over the rows of a chunk, both operands read as the panels that the step left behind. Rows are taken in
// blocks, summed from zero and then added: the block of X that a kernel sweep rereads stays in the L1 cache (16 KB),
// and two levels keep the error of a long sum down.
#pragma once
#include <cstdint>

#include "gemm/panels.h"

namespace rmc {
namespace RMC_ISA {

constexpr int64_t kGradientRows = 128;

// A block of R outputs and C vectors of inputs, added to `out` ([outputs, stride]). `in_step` is the place of the first
// panel in its step.
template <class V, int R, int C>
inline void weight_gradient_kernel(const typename V::T* dy, int64_t dy_stride, const typename V::T* x, int64_t x_stride,
                                   int64_t x_chunk, const Rows& rows, int64_t in_step, int64_t panels,
                                   typename V::T* out, int64_t out_stride) {
  constexpr int W = V::W;
  V acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int j = 0; j < C; j++) {
      acc[r][j] = V::zero();
      prefetch(out + r * out_stride + j * W);  // read at the end; no hardware prefetcher sees it coming
    }
  }
  for (int64_t p = 0; p < panels; p++, dy += dy_stride, x += x_stride) {
    int64_t n = rows.height;
    if (++in_step == rows.count) {
      n = rows.rows - (rows.count - 1) * rows.height;
      in_step = 0;
    }
    const typename V::T *d = dy, *a = x;
    for (int64_t i = 0; i < n; i++, d += W, a += W) {
      V input[C];
#pragma GCC unroll 2
      for (int j = 0; j < C; j++) input[j] = V::load(a + j * x_chunk);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const V y = V::set(d[r]);
#pragma GCC unroll 2
        for (int j = 0; j < C; j++) acc[r][j] = fma(y, input[j], acc[r][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int j = 0; j < C; j++) {
      typename V::T* to = out + r * out_stride + j * W;
      (V::load(to) + acc[r][j]).store(to);
    }
  }
}

// The rows `first` to `end` of dW, both multiples of W.
template <class V>
void vector_weight_gradient(const Panels<V>& dy, int64_t first, int64_t end, const Panels<V>& x, int64_t panels,
                            typename V::T* out) {
  using T = typename V::T;
  constexpr int W = V::W, R = V::kGradRows < W ? V::kGradRows : W;
  const int64_t chunk = x.chunk_stride();
  const int64_t block = dy.height < kGradientRows ? kGradientRows / dy.height : 1;
  for (int64_t p = 0; p < panels; p += block) {
    const int64_t count = panels - p < block ? panels - p : block;
    for (int64_t k = 0; k < x.columns / W;) {
      const bool two = (k + 2) * W <= x.columns;
      const auto kernel = two ? weight_gradient_kernel<V, R, 2> : weight_gradient_kernel<V, R, 1>;
      for (int64_t o = first; o < end; o += R) {
        const T* d = dy.panel(p) + o / W * dy.chunk_stride() + o % W;
        T* to = out + o * x.columns + k * W;
        kernel(d, dy.stride(), x.panel(p) + k * chunk, x.stride(), chunk, dy, p % dy.count, count, to, x.columns);
      }
      k += two ? 2 : 1;
    }
  }
}

// Where products are of tiles; in gemm/tile_gradient.h.
template <class V>
void tile_weight_gradient(const Panels<V>& dy, const Panels<V>& x, int64_t panels, float* out);

template <class V>
void weight_gradient(const Panels<V>& dy, const Panels<V>& x, int64_t panels, typename V::T* out) {
  if constexpr (V::kTerms > 0) {
    tile_weight_gradient(dy, x, panels, out);
  } else {
    vector_weight_gradient(dy, 0, dy.columns, x, panels, out);
  }
}

// out[c] += sum of the rows of dy.
template <class V>
void column_sums(const Panels<V>& dy, int64_t panels, typename V::T* out) {
  for (int64_t c = 0; c < dy.columns; c += V::W) {
    V total = V::zero();
    for (int64_t p = 0; p < panels; p++) {
      const typename V::T* d = dy.panel(p) + c * dy.height;
      const int64_t n = dy.in_panel(p);
      V part = V::load(d);
      for (int64_t i = 1; i < n; i++) part = part + V::load(d + i * V::W);
      total = total + part;
    }
    (V::load(out + c) + total).store(out + c);
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
