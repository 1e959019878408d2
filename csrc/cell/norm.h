// LayerNorm over rows, or (l0sg) over all live rows of a batch element together; forward and backward.
//
// Two passes, mean then deviations. A projection whose weights are centred over its outputs has mean 0 to begin with:
// its variance is a plain mean of squares, in one pass and without cancellation.
#pragma once
#include <cmath>

#include "cell/activations.h"

namespace rmc {
namespace RMC_ISA {

template <class T>
struct Affine {
  const T *gamma, *beta, *mask;
  int64_t columns, row_stride;  // row_stride: elements between the affine parts of two rows; 0 where they share one
  T count;                      // true features of a row

  Affine(const Norm& n, const T* packed)
      : gamma(packed + n.gamma),
        beta(packed + n.beta),
        mask(static_cast<const T*>(n.features.mask)),
        columns(n.features.padded),
        row_stride(n.rows > 1 ? n.features.padded : 0),
        count(static_cast<T>(n.features.size)) {}
};

constexpr double kEpsilon = 1e-5;

template <class T>
inline T inverse_deviation(T variance) {
  return T(1) / std::sqrt(variance + T(kEpsilon));
}

// Sums of even and odd chunks apart: two chains of additions instead of one.
template <class V, class Chunk>
inline typename V::T sum_chunks(int64_t columns, Chunk chunk) {
  V even = V::zero(), odd = V::zero();
  int64_t c = 0;
  for (; c + 2 * V::W <= columns; c += 2 * V::W) {
    even = chunk(c, even);
    odd = chunk(c + V::W, odd);
  }
  if (c < columns) even = chunk(c, even);
  return sum(even + odd);
}

// y and out are row starts; `height` is the panel height, so that column c of a row is at c * height.
template <class V>
inline void scale_row(const typename V::T* y, typename V::T mean, typename V::T rstd, const typename V::T* gamma,
                      const typename V::T* beta, const Affine<typename V::T>& affine, int32_t height,
                      typename V::T* hat, typename V::T* out) {
  const V mu = V::set(mean), scale = V::set(rstd);
  for (int64_t c = 0; c < affine.columns; c += V::W) {
    const V x = without_padding((V::load(y + c * height) - mu) * scale, affine.mask, c);
    if (hat) x.store(hat + c * height);
    fma(x, V::load(gamma + c), V::load(beta + c)).store(out + c * height);
  }
}

// A power of two by which `count` numbers are multiplied before they are summed, so that the sum overflows only where
// their mean does. Nothing is rounded by it.
template <class T>
inline T share(T count) {
  return std::ldexp(T(1), -std::ilogb(count) - 1);
}

// Returns the sum, `share` times.
template <class V>
inline typename V::T add_and_sum(const typename V::T* y, const typename V::T* residual, int64_t columns, int32_t height,
                                 typename V::T share, typename V::T* out) {
  const V factor = V::set(share);
  return sum_chunks<V>(columns, [&](int64_t c, V total) {
    V x = V::load(y + c * height);
    if (residual) x = x + V::load(residual + c * height);
    x.store(out + c * height);
    return fma(x, factor, total);
  });
}

template <class V>
inline typename V::T squared_deviations(const typename V::T* x, typename V::T mean, const typename V::T* mask,
                                        int64_t columns, int32_t height) {
  const V mu = V::set(mean);
  return sum_chunks<V>(columns, [&](int64_t c, V total) {
    const V d = without_padding(V::load(x + c * height) - mu, mask, c);
    return fma(d, d, total);
  });
}

// Several panels of rows; each pointer-like argument is a matrix and the panel where its rows start.
template <class V>
struct Window {
  Panels<V> matrix;
  int64_t first = 0;
  typename V::T* row(int64_t p, int32_t i) const { return matrix.data ? matrix.panel(first + p) + i * V::W : nullptr; }
  typename V::T* at(int64_t p, int64_t r) const { return matrix.data ? matrix.row(first + p, r) : nullptr; }
};

// out = norm(y + residual); rstd (may be null) is indexed by padded row.
template <class V>
void norm_rows(const Window<V>& y, const Window<V>& residual, const Affine<typename V::T>& affine, bool centred,
               const Window<V>& hat, const Window<V>& out, typename V::T* rstd, const Rows& rows, int64_t panels) {
  using T = typename V::T;
  const int32_t height = rows.height;
  const T part = share(affine.count);
  for (int64_t p = 0; p < panels; p++) {
    const int64_t n = rows.in_panel(p);
    for (int32_t i = 0; i < n; i++) {
      const T* from = y.row(p, i);
      T* to = out.row(p, i);
      T mean = 0, squares;
      if (centred) {
        squares = squared_deviations<V>(from, T(0), nullptr, affine.columns, height);
      } else {
        mean = add_and_sum<V>(from, residual.row(p, i), affine.columns, height, part, to) / (affine.count * part);
        squares = squared_deviations<V>(to, mean, affine.mask, affine.columns, height);
        from = to;
      }
      const T scale = inverse_deviation(squares / affine.count);
      if (rstd) rstd[p * height + i] = scale;
      scale_row<V>(from, mean, scale, affine.gamma, affine.beta, affine, height, hat.row(p, i), to);
    }
  }
}

// The same over the `live` rows of each element of each step; rstd is indexed by element within a step.
template <class V>
void norm_elements(const Window<V>& y, const Window<V>& residual, const Affine<typename V::T>& affine,
                   const Window<V>& hat, const Window<V>& out, typename V::T* rstd, int64_t rstd_stride,
                   const TileRows& rows, int64_t live, int64_t steps) {
  using T = typename V::T;
  const int32_t height = rows.live.height;
  const T count = affine.count * static_cast<T>(live), part = share(count);
  for (int64_t s = 0; s < steps; s++) {
    const int64_t p = s * rows.live.count;
    for (int64_t e = 0; e < rows.elements; e++) {
      T total = 0, squares = 0;
      for (int64_t r = e * live; r < (e + 1) * live; r++)
        total += add_and_sum<V>(y.at(p, r), residual.at(p, r), affine.columns, height, part, out.at(p, r));
      const T mean = total / (count * part);
      for (int64_t r = e * live; r < (e + 1) * live; r++)
        squares += squared_deviations<V>(out.at(p, r), mean, affine.mask, affine.columns, height);
      const T scale = inverse_deviation(squares / count);
      if (rstd) rstd[s * rstd_stride + e] = scale;
      for (int64_t i = 0; i < live; i++) {
        const int64_t r = e * live + i, shift = i * affine.row_stride;
        scale_row<V>(out.at(p, r), mean, scale, affine.gamma + shift, affine.beta + shift, affine, height, hat.at(p, r),
                     out.at(p, r));
      }
    }
  }
}

// ---- Backward: dx = rstd (g - mean(g) - hat mean(g hat)), g = dy gamma
// ------------------------------------------------

template <class T>
struct NormSums {
  T g, gh;
};

// d holds dy and becomes g; the gradients of the affine part are added up in dgamma and dbeta. R rows at a time share
// the loads and stores of those.
template <class V, int R>
inline void norm_back_sums(typename V::T* d, const typename V::T* hat, const typename V::T* hat_scale,
                           const typename V::T* gamma, int64_t columns, int32_t height, typename V::T* dgamma,
                           typename V::T* dbeta, NormSums<typename V::T>* sums) {
  constexpr int W = V::W;
  V s0[R], s1[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) s0[r] = s1[r] = V::zero();
  for (int64_t c = 0; c < columns; c += W) {
    const V scale = V::load(gamma + c);
    V dg = V::zero(), db = V::zero();
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const V dy = V::load(d + c * height + r * W);
      const V h = V::load(hat + c * height + r * W) * V::set(hat_scale[r]);
      dg = fma(dy, h, dg);
      db = db + dy;
      const V g = dy * scale;
      s0[r] = s0[r] + g;
      s1[r] = fma(g, h, s1[r]);
      g.store(d + c * height + r * W);
    }
    (V::load(dgamma + c) + dg).store(dgamma + c);
    (V::load(dbeta + c) + db).store(dbeta + c);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) sums[r] = {sum(s0[r]), sum(s1[r])};
}

template <class V>
inline void norm_back_row(typename V::T* d, const typename V::T* hat, typename V::T hat_scale, typename V::T rstd,
                          NormSums<typename V::T> mean, const typename V::T* mask, int64_t columns, int32_t height) {
  const V g0 = V::set(mean.g), g1 = V::set(mean.gh * hat_scale), scale = V::set(rstd);
  for (int64_t c = 0; c < columns; c += V::W) {
    const V x = fnma(V::load(hat + c * height), g1, V::load(d + c * height) - g0) * scale;
    without_padding(x, mask, c).store(d + c * height);
  }
}

// `hat_is_raw`: hat still has to be multiplied with rstd (a centred projection that was kept as it came).
template <class V>
void norm_rows_back(const Window<V>& d, const Window<V>& hat, bool hat_is_raw, const typename V::T* rstd,
                    const Affine<typename V::T>& affine, typename V::T* dgamma, typename V::T* dbeta, const Rows& rows,
                    int64_t panels) {
  using T = typename V::T;
  const int32_t height = rows.height;
  NormSums<T> sums[4];
  for (int64_t p = 0; p < panels; p++) {
    const int64_t n = rows.in_panel(p);
    for (int64_t i = 0; i < n;) {
      const int64_t take = n - i >= 4 ? 4 : 1;
      T scale[4];
      for (int64_t r = 0; r < take; r++) scale[r] = hat_is_raw ? rstd[p * height + i + r] : T(1);
      const auto kernel = take == 4 ? norm_back_sums<V, 4> : norm_back_sums<V, 1>;
      kernel(d.row(p, i), hat.row(p, i), scale, affine.gamma, affine.columns, height, dgamma, dbeta, sums);
      for (int64_t r = 0; r < take; r++) {
        const NormSums<T> mean = {sums[r].g / affine.count, sums[r].gh / affine.count};
        norm_back_row<V>(d.row(p, i + r), hat.row(p, i + r), scale[r], rstd[p * height + i + r], mean, affine.mask,
                         affine.columns, height);
      }
      i += take;
    }
  }
}

template <class V>
void norm_elements_back(const Window<V>& d, const Window<V>& hat, const typename V::T* rstd,
                        const Affine<typename V::T>& affine, typename V::T* dgamma, typename V::T* dbeta,
                        const TileRows& rows, int64_t live) {
  using T = typename V::T;
  const int32_t height = rows.live.height;
  const T count = affine.count * static_cast<T>(live), one = 1;
  for (int64_t e = 0; e < rows.elements; e++) {
    NormSums<T> total = {0, 0}, row;
    for (int64_t i = 0; i < live; i++) {
      const int64_t r = e * live + i, shift = i * affine.row_stride;
      norm_back_sums<V, 1>(d.at(0, r), hat.at(0, r), &one, affine.gamma + shift, affine.columns, height, dgamma + shift,
                           dbeta + shift, &row);
      total.g += row.g;
      total.gh += row.gh;
    }
    for (int64_t r = e * live; r < (e + 1) * live; r++)
      norm_back_row<V>(d.at(0, r), hat.at(0, r), T(1), rstd[e], {total.g / count, total.gh / count}, affine.mask,
                       affine.columns, height);
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
