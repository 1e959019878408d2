// dW += dY^T X over the rows of a chunk, both operands read as the panels that the step left behind. Rows are taken in
// blocks of kGradientRows, so that the block of X that a kernel sweep rereads stays in the L1 cache (16 KB).
//
// Every sum has three levels, which keep its error down: chains of kChainRows from zero, added up in the block, which
// is added to dW. Slots tend to be alike, and a long chain rounds the same summand the same way again and again: 96
// rows of 6 slots in one chain had up to 7 times PyTorch's largest error, whose chains have the rows of a step. Chains
// of 32 take 1 to 4 % more time than none.
#pragma once
#include <cstdint>

#include "gemm/panels.h"

namespace rmc {
namespace RMC_ISA {

constexpr int64_t kGradientRows = 128;
constexpr int64_t kChainRows = 32;

inline int64_t chain_panels(const Rows& rows) { return rows.height < kChainRows ? kChainRows / rows.height : 1; }

// A block of R outputs and C vectors of inputs, added to `out` ([outputs, stride]). `in_step` is the place of the first
// panel in its step.
template <class V, int R, int C>
inline void weight_gradient_kernel(const typename V::T* dy, int64_t dy_stride, const typename V::T* x, int64_t x_stride,
                                   int64_t x_chunk, const Rows& rows, int64_t in_step, int64_t panels,
                                   typename V::T* out, int64_t out_stride) {
  constexpr int W = V::W;
  V sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int j = 0; j < C; j++) {
      sum[r][j] = V::zero();
      prefetch(out + r * out_stride + j * W);  // read at the end; no hardware prefetcher sees it coming
    }
  }
  const int64_t chain = chain_panels(rows);
  for (int64_t p = 0; p < panels; p += chain) {
    V acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
      for (int j = 0; j < C; j++) acc[r][j] = V::zero();
    }
    for (int64_t q = p; q < p + chain && q < panels; q++, dy += dy_stride, x += x_stride) {
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
      for (int j = 0; j < C; j++) sum[r][j] = sum[r][j] + acc[r][j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int j = 0; j < C; j++) {
      typename V::T* to = out + r * out_stride + j * W;
      (V::load(to) + sum[r][j]).store(to);
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

// out[c] += sum of the rows of dy: of a panel, of as many panels as are in a chain, of all.
template <class V>
void column_sums(const Panels<V>& dy, int64_t panels, typename V::T* out) {
  const int64_t chain = chain_panels(dy);
  for (int64_t c = 0; c < dy.columns; c += V::W) {
    V total = V::zero();
    for (int64_t p = 0; p < panels; p += chain) {
      V block = V::zero();
      for (int64_t q = p; q < p + chain && q < panels; q++) {
        const typename V::T* d = dy.panel(q) + c * dy.height;
        const int64_t n = dy.in_panel(q);
        V part = V::load(d);
        for (int64_t i = 1; i < n; i++) part = part + V::load(d + i * V::W);
        block = block + part;
      }
      total = total + block;
    }
    (V::load(out + c) + total).store(out + c);
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
