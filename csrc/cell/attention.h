// Attention inside one batch element. The lanes of a vector are (head, query row) pairs, so that softmax, which runs
// over the keys, needs no operation across lanes.
#pragma once
#include <cmath>

#include "cell/plan.h"
#include "common/scratch.h"
#include "simd/math.h"

namespace rmc {
namespace RMC_ISA {

// A row whose chunks of W columns are `step` apart.
template <class T>
struct StridedRow {
  T* data;
  int64_t step;
};

// out[j][lane] = a(row of lane)[head of lane] . b(j)[head of lane] for lanes from `lane` on, all j < keys.
// `a_stride` and `b_stride` are columns between heads; `width` columns are multiplied.
template <class V>
void head_products(const Plan& plan, const StridedRow<typename V::T>* a, int64_t a_column, int64_t a_stride,
                   const StridedRow<typename V::T>* b, int64_t b_column, int64_t b_stride, int64_t width, int64_t lane,
                   typename V::T* out) {
  using T = typename V::T;
  constexpr int W = V::W;
  const int64_t pairs = plan.H * plan.Q - lane;
  const int count = pairs < W ? static_cast<int>(pairs) : W;
  const T* from[W];
  int64_t step[W], head[W];
  for (int l = 0; l < count; l++) {
    const int64_t h = (lane + l) / plan.Q, r = (lane + l) % plan.Q;
    step[l] = a[r].step;
    from[l] = a[r].data + (a_column + h * a_stride) / W * step[l];
    head[l] = b_column + h * b_stride;
  }
  for (int64_t j = 0; j < plan.S; j++) {
    V total[W];
    for (int l = 0; l < count; l++) {
      const T *x = from[l], *y = b[j].data + head[l] / W * b[j].step;
      V t = V::load(x) * V::load(y);
      for (int64_t c = 1; c < width / W; c++) t = fma(V::load(x + c * step[l]), V::load(y + c * b[j].step), t);
      total[l] = t;
    }
    for (int l = count; l < W; l++) total[l] = V::zero();
    V::sums(total).store(out + j * plan.lanes);
  }
}

// to(i) = sum over j of weight[i * wi + j * wj] * from(j), for rows of `width` columns; each sum in the order of j.
template <class V>
void mix_rows(int64_t outputs, int64_t inputs, const StridedRow<typename V::T>* from, int64_t from_column,
              const typename V::T* weight, int64_t wi, int64_t wj, const StridedRow<typename V::T>* to,
              int64_t to_column, int64_t width) {
  using T = typename V::T;
  constexpr int64_t W = V::W;
  for (int64_t c = 0; c < width; c += 2 * W) {
    const int64_t c0 = (from_column + c) / W, c1 = c + W < width ? c0 + 1 : c0;
    for (int64_t i = 0; i < outputs; i += 4) {
      const int64_t left = outputs - 1 - i;
      const int64_t k1 = (left < 1 ? left : 1) * wi, k2 = (left < 2 ? left : 2) * wi, k3 = (left < 3 ? left : 3) * wi;
      V a[4][2];
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) a[r][0] = a[r][1] = V::zero();
      const T* p = weight + i * wi;
      for (int64_t j = 0; j < inputs; j++, p += wj) {
        const V v0 = V::load(from[j].data + c0 * from[j].step), v1 = V::load(from[j].data + c1 * from[j].step);
        const V w[4] = {V::set(p[0]), V::set(p[k1]), V::set(p[k2]), V::set(p[k3])};
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
          a[r][0] = fma(w[r], v0, a[r][0]);
          a[r][1] = fma(w[r], v1, a[r][1]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        if (r > left) continue;
        const StridedRow<T>& out = to[i + r];
        a[r][0].store(out.data + (to_column + c) / W * out.step);
        if (c + W < width) a[r][1].store(out.data + ((to_column + c) / W + 1) * out.step);
      }
    }
  }
}

// Scratch of one element.
template <class V>
struct AttentionScratch {
  using T = typename V::T;
  StridedRow<T>*keys, *outputs;  // [S], [Q]
  StridedRow<T>*grads, *inputs;  // backward: [S], [Q]
  T *dropped, *mask, *scores;    // [S, lanes]
  T* wide;                       // [S, H Vp]: rows of heads that are padded

  void bind(Bump& bump, const Plan& plan) {
    keys = bump.take<StridedRow<T>>(plan.S);
    outputs = bump.take<StridedRow<T>>(plan.Q);
    grads = bump.take<StridedRow<T>>(plan.S);
    inputs = bump.take<StridedRow<T>>(plan.Q);
    dropped = bump.take<T>(plan.S * plan.lanes);
    mask = bump.take<T>(plan.S * plan.lanes);
    scores = bump.take<T>(plan.S * plan.lanes);
    wide = bump.take<T>(plan.S * plan.H * plan.Vp);
  }
};

// mask[h][row][key] of one element and step to [key][lane], the layout of the weights.
template <class T>
void transpose_mask(const Plan& plan, const T* mask, T* out) {
  const int64_t pairs = plan.H * plan.Q;
  for (int64_t j = 0; j < plan.S; j++) {
    for (int64_t l = 0; l < plan.lanes; l++) out[j * plan.lanes + l] = l < pairs ? mask[l * plan.S + j] : T(0);
  }
}

// Between rows of D columns and rows of H heads of Vp columns, where a head is no multiple of W.
template <class V>
void narrow_heads(const Plan& plan, const typename V::T* wide, const StridedRow<typename V::T>& row) {
  constexpr int64_t W = V::W;
  for (int64_t d = 0; d < plan.Dp; d++) {
    row.data[d / W * row.step + d % W] = d < plan.D ? wide[d / plan.V * plan.Vp + d % plan.V] : 0;
  }
}
template <class V>
void widen_heads(const Plan& plan, const StridedRow<typename V::T>& row, typename V::T* wide) {
  constexpr int64_t W = V::W;
  for (int64_t i = 0; i < plan.H * plan.Vp; i++) {
    const int64_t h = i / plan.Vp, v = i % plan.Vp, d = h * plan.V + v;
    wide[i] = v < plan.V ? row.data[d / W * row.step + d % W] : 0;
  }
}

template <class V>
inline bool heads_padded(const Plan& plan) {
  return plan.V != plan.Vp;
}

// keys: rows with q | k | v per head, live rows first. weights [S][lanes] receives the softmax before dropout. Writes
// the concatenated heads of the Q live rows to `outputs`.
template <class V>
void attend(const Plan& plan, const AttentionScratch<V>& s, typename V::T* weights, const typename V::T* mask) {
  using T = typename V::T;
  constexpr int W = V::W;
  const int64_t lanes = plan.lanes, S = plan.S;
  const V scale = V::set(T(1) / std::sqrt(static_cast<T>(plan.K)));
  for (int64_t lane = 0; lane < lanes; lane += W) {
    T* p = weights + lane;
    head_products<V>(plan, s.keys, 0, plan.head_stride, s.keys, plan.Kp, plan.head_stride, plan.Kp, lane, p);
    V top = V::load(p);
    for (int64_t j = 1; j < S; j++) top = max(top, V::load(p + j * lanes));
    V total = V::zero();
    for (int64_t j = 0; j < S; j++) {
      const V e = exp((V::load(p + j * lanes) - top) * scale);
      e.store(p + j * lanes);
      total = total + e;
    }
    const V inverse = V::set(T(1)) / total;
    for (int64_t j = 0; j < S; j++) (V::load(p + j * lanes) * inverse).store(p + j * lanes);
  }
  const T* used = weights;
  if (mask) {
    transpose_mask(plan, mask, s.mask);
    for (int64_t i = 0; i < S * lanes; i += W) (V::load(weights + i) * V::load(s.mask + i)).store(s.dropped + i);
    used = s.dropped;
  }
  const bool padded = heads_padded<V>(plan);
  if (padded) {
    for (int64_t r = 0; r < plan.Q; r++) s.inputs[r] = {s.wide + r * plan.H * plan.Vp, W};
  }
  const StridedRow<T>* to = padded ? s.inputs : s.outputs;
  for (int64_t h = 0; h < plan.H; h++) {
    mix_rows<V>(plan.Q, S, s.keys, h * plan.head_stride + 2 * plan.Kp, used + h * plan.Q, 1, lanes, to, h * plan.Vp,
                plan.Vp);
  }
  if (padded) {
    for (int64_t r = 0; r < plan.Q; r++) narrow_heads<V>(plan, s.wide + r * plan.H * plan.Vp, s.outputs[r]);
  }
}

// outputs: gradients of the concatenated heads. grads: receives those of q | k | v of all S rows (q of live rows only).
template <class V>
void attend_back(const Plan& plan, const AttentionScratch<V>& s, const typename V::T* weights,
                 const typename V::T* mask) {
  using T = typename V::T;
  constexpr int W = V::W;
  const int64_t lanes = plan.lanes, S = plan.S;
  const V scale = V::set(T(1) / std::sqrt(static_cast<T>(plan.K)));
  const StridedRow<T>* d = s.outputs;
  if (heads_padded<V>(plan)) {
    for (int64_t r = 0; r < plan.Q; r++) {
      s.inputs[r] = {s.wide + r * plan.H * plan.Vp, W};
      widen_heads<V>(plan, s.outputs[r], s.inputs[r].data);
    }
    d = s.inputs;
  }
  const T* used = weights;
  if (mask) {
    transpose_mask(plan, mask, s.mask);
    for (int64_t i = 0; i < S * lanes; i += W) (V::load(weights + i) * V::load(s.mask + i)).store(s.dropped + i);
    used = s.dropped;
  }
  for (int64_t lane = 0; lane < lanes; lane += W) {
    T* p = s.scores + lane;
    const T* w = weights + lane;
    head_products<V>(plan, d, 0, plan.Vp, s.keys, 2 * plan.Kp, plan.head_stride, plan.Vp, lane, p);
    V total = V::zero();
    for (int64_t j = 0; j < S; j++) {
      V g = V::load(p + j * lanes);
      if (mask) {
        g = g * V::load(s.mask + lane + j * lanes);
        g.store(p + j * lanes);
      }
      total = fma(g, V::load(w + j * lanes), total);
    }
    for (int64_t j = 0; j < S; j++)
      (V::load(w + j * lanes) * (V::load(p + j * lanes) - total) * scale).store(p + j * lanes);
  }
  for (int64_t h = 0; h < plan.H; h++) {
    const int64_t q = h * plan.head_stride, k = q + plan.Kp, v = k + plan.Kp, first = h * plan.Q;
    mix_rows<V>(plan.Q, S, s.keys, k, s.scores + first, 1, lanes, s.grads, q, plan.Kp);
    mix_rows<V>(S, plan.Q, s.keys, q, s.scores + first, lanes, 1, s.grads, k, plan.Kp);
    mix_rows<V>(S, plan.Q, d, h * plan.Vp, used + first, lanes, 1, s.grads, v, plan.Vp);
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
