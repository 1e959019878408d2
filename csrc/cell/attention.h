// Attention inside one batch element. The lanes of a vector are (head, query row) pairs, so that softmax, which runs
// over the keys, needs no operation across lanes.
#pragma once
#include <cmath>

#include "cell/plan.h"
#include "common/bump.h"
#include "gemm/panels.h"
#include "simd/math.h"

namespace rmc {
namespace RMC_ISA {

// A row whose chunks of W columns are `step` apart.
template <class T>
struct StridedRow {
  T* data;
  int64_t step;
};

// out[j][lane] = a(row of lane)[head of lane] . b(j)[head of lane] for a vector of lanes from `lane` on, all j < S.
// `a_stride` and `b_stride` are columns between heads; `width` columns are multiplied.
template <class V>
void lane_products(const Plan& plan, const StridedRow<typename V::T>* a, int64_t a_column, int64_t a_stride,
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
    V::sums(total).store(out + j * plan.lane_stride);
  }
}

// Rows from which on many_head_products pays: a forward pass with 4 heads of 16 columns took 0.77 of the time at 256
// slots, 0.95 at 64 and 32, and as much at 16.
constexpr int64_t kManyRows = 32;

// Columns of a head that is turned; a line more than needed, which spreads its rows over the sets of the L1 cache.
template <class V>
int64_t turned_stride(const Plan& plan) {
  return (plan.Q + V::W - 1) / V::W * V::W + static_cast<int64_t>(64 / sizeof(typename V::T));
}

// As lane_products, for all lanes of heads with many rows: a head's columns are turned into rows of lanes first, so
// that no sum goes across lanes. `turned` is room for `width` rows.
template <class V>
void many_head_products(const Plan& plan, const StridedRow<typename V::T>* a, int64_t a_column, int64_t a_stride,
                        const StridedRow<typename V::T>* b, int64_t b_column, int64_t b_stride, int64_t width,
                        typename V::T* turned, typename V::T* out) {
  using T = typename V::T;
  constexpr int64_t W = V::W, kKeys = 4, kBlock = 64;  // short chains, as in gemm/gemm.h
  const int64_t stride = turned_stride<V>(plan);
  for (int64_t h = 0; h < plan.H; h++) {
    const int64_t from = (a_column + h * a_stride) / W, with = (b_column + h * b_stride) / W;
    for (int64_t r = 0; r < plan.Q; r++) {
      for (int64_t c = 0; c < width; c++) turned[c * stride + r] = a[r].data[(from + c / W) * a[r].step + c % W];
    }
    for (int64_t r = 0; r < plan.Q; r += 2 * W) {
      const int64_t left = plan.Q - r, second = left > W ? W : 0;
      for (int64_t j = 0; j < plan.S; j += kKeys) {
        const int64_t keys = plan.S - j < kKeys ? plan.S - j : kKeys;
        const StridedRow<T>* key[kKeys];
        for (int64_t i = 0; i < kKeys; i++) key[i] = b + j + (i < keys ? i : keys - 1);
        V total[kKeys][2];
        for (auto& t : total) t[0] = t[1] = V::zero();
        for (int64_t k0 = 0; k0 < width; k0 += kBlock) {
          V acc[kKeys][2];
#pragma GCC unroll 4
          for (int i = 0; i < kKeys; i++) acc[i][0] = acc[i][1] = V::zero();
          for (int64_t k = k0; k < k0 + kBlock && k < width; k += W) {
            const T* p[kKeys];
            for (int i = 0; i < kKeys; i++) p[i] = key[i]->data + (with + k / W) * key[i]->step;
            const T* q = turned + k * stride + r;
#pragma GCC unroll 2
            for (int64_t u = 0; u < W; u++, q += stride) {
              const V v0 = V::load(q), v1 = V::load(q + second);
#pragma GCC unroll 4
              for (int i = 0; i < kKeys; i++) {
                const V w = V::set(p[i][u]);
                acc[i][0] = fma(w, v0, acc[i][0]);
                acc[i][1] = fma(w, v1, acc[i][1]);
              }
            }
          }
#pragma GCC unroll 4
          for (int i = 0; i < kKeys; i++) total[i][0] = total[i][0] + acc[i][0], total[i][1] = total[i][1] + acc[i][1];
        }
        for (int64_t i = 0; i < keys; i++) {
          T* to = out + (j + i) * plan.lane_stride + h * plan.Q + r;
          total[i][0].store_n(to, left < W ? left : W);
          if (second) total[i][1].store_n(to + W, left < 2 * W ? left - W : W);
        }
      }
    }
  }
}

// All lanes, by whichever way is the faster.
template <class V>
void head_products(const Plan& plan, const StridedRow<typename V::T>* a, int64_t a_column, int64_t a_stride,
                   const StridedRow<typename V::T>* b, int64_t b_column, int64_t b_stride, int64_t width,
                   typename V::T* turned, typename V::T* out) {
  if (plan.Q >= kManyRows) {
    many_head_products<V>(plan, a, a_column, a_stride, b, b_column, b_stride, width, turned, out);
  } else {
    for (int64_t lane = 0; lane < plan.lanes; lane += V::W)
      lane_products<V>(plan, a, a_column, a_stride, b, b_column, b_stride, width, lane, out + lane);
  }
}

// to(i) = sum over j of weight[i * wi + j * wj] * from(j), for rows of `width` columns; each sum in the order of j.
// `mask` is that of the axis of `to`.
template <class V>
void mix_rows(int64_t outputs, int64_t inputs, const StridedRow<typename V::T>* from, int64_t from_column,
              const typename V::T* weight, int64_t wi, int64_t wj, const StridedRow<typename V::T>* to,
              int64_t to_column, int64_t width, const typename V::T* mask) {
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
        without_padding(a[r][0], mask, to_column + c).store(out.data + (to_column + c) / W * out.step);
        if (c + W < width)
          without_padding(a[r][1], mask, to_column + c + W).store(out.data + ((to_column + c) / W + 1) * out.step);
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
  T *dropped, *mask, *scores;    // [S, lane_stride]
  T* wide;                       // [S, H Vp]: rows of heads that are padded
  T* turned;                     // [Kp or Vp, turned_stride]: a head of many rows

  void bind(Bump& bump, const Plan& plan) {
    keys = bump.take<StridedRow<T>>(plan.S);
    outputs = bump.take<StridedRow<T>>(plan.Q);
    grads = bump.take<StridedRow<T>>(plan.S);
    inputs = bump.take<StridedRow<T>>(plan.Q);
    dropped = bump.take<T>(plan.S * plan.lane_stride);
    mask = bump.take<T>(plan.S * plan.lane_stride);
    scores = bump.take<T>(plan.S * plan.lane_stride);
    wide = bump.take<T>(plan.S * plan.H * plan.Vp);
    if (plan.Q >= kManyRows) turned = bump.take<T>((plan.Kp > plan.Vp ? plan.Kp : plan.Vp) * turned_stride<V>(plan));
  }
};

// mask[h][row][key] of one element and step to [key][lane], the layout of the weights.
template <class T>
void transpose_mask(const Plan& plan, const T* mask, T* out) {
  const int64_t pairs = plan.H * plan.Q;
  for (int64_t j = 0; j < plan.S; j++) {
    T* to = out + j * plan.lane_stride;
    for (int64_t l = 0; l < plan.lane_stride; l++) to[l] = l < pairs ? mask[l * plan.S + j] : T(0);
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

// keys: rows with q | k | v per head, live rows first. weights [S][lane_stride] receives the softmax before dropout.
// Writes the concatenated heads of the Q live rows to `outputs`.
template <class V>
void attend(const Plan& plan, const AttentionScratch<V>& s, typename V::T* weights, const typename V::T* mask) {
  using T = typename V::T;
  constexpr int W = V::W;
  const int64_t lanes = plan.lanes, stride = plan.lane_stride, S = plan.S;
  const V scale = V::set(T(1) / std::sqrt(static_cast<T>(plan.K)));
  head_products<V>(plan, s.keys, 0, plan.head_stride, s.keys, plan.Kp, plan.head_stride, plan.Kp, s.turned, weights);
  for (int64_t lane = 0; lane < lanes; lane += W) {
    T* p = weights + lane;
    V top = V::load(p);
    for (int64_t j = 1; j < S; j++) top = max(top, V::load(p + j * stride));
    V total = V::zero();
    for (int64_t j = 0; j < S; j++) {
      const V e = exp((V::load(p + j * stride) - top) * scale);
      e.store(p + j * stride);
      total = total + e;
    }
    const V inverse = V::set(T(1)) / total;
    for (int64_t j = 0; j < S; j++) (V::load(p + j * stride) * inverse).store(p + j * stride);
  }
  const T* used = weights;
  if (mask) {
    transpose_mask(plan, mask, s.mask);
    for (int64_t i = 0; i < S * stride; i += W) (V::load(weights + i) * V::load(s.mask + i)).store(s.dropped + i);
    used = s.dropped;
  }
  const bool padded = heads_padded<V>(plan);
  if (padded) {
    for (int64_t r = 0; r < plan.Q; r++) s.inputs[r] = {s.wide + r * plan.H * plan.Vp, W};
  }
  const StridedRow<T>* to = padded ? s.inputs : s.outputs;
  for (int64_t h = 0; h < plan.H; h++) {
    mix_rows<V>(plan.Q, S, s.keys, h * plan.head_stride + 2 * plan.Kp, used + h * plan.Q, 1, stride, to, h * plan.Vp,
                plan.Vp, nullptr);  // narrow_heads drops the padding
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
  const int64_t lanes = plan.lanes, stride = plan.lane_stride, S = plan.S;
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
    for (int64_t i = 0; i < S * stride; i += W) (V::load(weights + i) * V::load(s.mask + i)).store(s.dropped + i);
    used = s.dropped;
  }
  head_products<V>(plan, d, 0, plan.Vp, s.keys, 2 * plan.Kp, plan.head_stride, plan.Vp, s.turned, s.scores);
  for (int64_t lane = 0; lane < lanes; lane += W) {
    T* p = s.scores + lane;
    const T* w = weights + lane;
    V total = V::zero();
    for (int64_t j = 0; j < S; j++) {
      V g = V::load(p + j * stride);
      if (mask) {
        g = g * V::load(s.mask + lane + j * stride);
        g.store(p + j * stride);
      }
      total = fma(g, V::load(w + j * stride), total);
    }
    for (int64_t j = 0; j < S; j++)
      (V::load(w + j * stride) * (V::load(p + j * stride) - total) * scale).store(p + j * stride);
  }
  const T* padding = static_cast<const T*>(plan.block_at(0).qkv.out.mask);
  for (int64_t h = 0; h < plan.H; h++) {
    const int64_t q = h * plan.head_stride, k = q + plan.Kp, v = k + plan.Kp, first = h * plan.Q;
    mix_rows<V>(plan.Q, S, s.keys, k, s.scores + first, 1, stride, s.grads, q, plan.Kp, padding);
    mix_rows<V>(S, plan.Q, s.keys, q, s.scores + first, stride, 1, s.grads, k, plan.Kp, padding);
    mix_rows<V>(S, plan.Q, d, h * plan.Vp, used + first, stride, 1, s.grads, v, plan.Vp, padding);
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
