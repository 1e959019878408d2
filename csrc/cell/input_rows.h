// What does not depend on the memory, for several steps of a tile at once: the projected input rows, their q | k | v
// (where input rows only serve as keys and values), and the gates' input term with every bias in it.
#pragma once
#include "cell/tile.h"
#include "gemm/gemm.h"

namespace rmc {
namespace RMC_ISA {

template <class V>
class InputRows {
 public:
  using T = typename V::T;
  Panels<V> x, u;      // [steps, elements, n] rows; the same where there is no projection
  Panels<V> flat;      // [steps, elements] rows of n Dp columns: u again where n = 1
  Panels<V> raw, qkv;  // before and after the LayerNorm; one buffer unless kept
  Panels<V> gates;     // [steps, elements] rows
  T* rstd = nullptr;
  Rows rows, pairs;  // of all steps together

  InputRows(const Plan& plan, int64_t elements, bool keep) : plan_(plan), elements_(elements), keep_(keep) {}

  void bind(Bump& bump, int64_t steps) {
    rows = whole(steps * elements_ * plan_.n);
    pairs = whole(steps * elements_);
    x = Panels<V>(bump, rows, plan_.Ip);
    u = plan_.config.input_projection ? Panels<V>(bump, rows, plan_.Dp) : x;
    if (!plan_.live_inputs) {
      raw = Panels<V>(bump, rows, plan_.Fp);
      qkv = plan_.config.qkv_norm && keep_ ? Panels<V>(bump, rows, plan_.Fp) : raw;
      rstd = bump.take<T>(rows.count * rows.height);
    }
    if (plan_.G) {
      flat = plan_.n == 1 ? u : Panels<V>(bump, pairs, plan_.n * plan_.Dp);
      gates = Panels<V>(bump, pairs, 2 * plan_.Gp);
    }
  }

  int64_t row_index(int64_t s, int64_t e, int64_t i) const { return (s * elements_ + e) * plan_.n + i; }
  int64_t pair_index(int64_t s, int64_t e) const { return s * elements_ + e; }

  // Steps t0 .. t0 + steps of the tile; what lies past an element's length counts as zeros.
  void compute(const Tile<V>& tile, int64_t t0, int64_t steps) {
    const Weights<V>& w = tile.weights;
    for (int64_t s = 0; s < steps; s++) {
      for (int64_t e = 0; e < elements_; e++) {
        const T* from =
            static_cast<const T*>(tile.in.x) + ((tile.first + e) * tile.in.steps + t0 + s) * plan_.n * plan_.I;
        for (int64_t i = 0; i < plan_.n; i++) {
          load_row<V>(tile.runs(e, t0 + s) ? from + i * plan_.I : nullptr, plan_.I, plan_.Ip, x.height,
                      x.row(0, row_index(s, e, i)));
        }
      }
    }
    if (plan_.config.input_projection) w.multiply(plan_.input, {x, 0, w.bias(plan_.input), u, 0, rows.count});
    if (!plan_.live_inputs) {
      const Block& block = plan_.block_at(0);
      w.multiply(block.qkv, {u, 0, w.bias(block.qkv), raw, 0, rows.count});
      if (plan_.config.qkv_norm) {
        norm_rows<V>({raw, 0}, {}, Affine<T>(block.qkv_norm, w.packed), true, {}, {qkv, 0}, rstd, rows, rows.count);
      }
    }
    if (plan_.G) {
      if (plan_.n > 1) flatten(steps);
      w.multiply(plan_.input_gate, {flat, 0, w.bias(plan_.input_gate), gates, 0, pairs.count});
    }
  }

 private:
  Rows whole(int64_t count) const {
    const int32_t height = panel_height(count, plan_.max_rows);
    return {count, (count + height - 1) / height, height};
  }
  void flatten(int64_t steps) {
    for (int64_t pair = 0; pair < steps * elements_; pair++) {
      for (int64_t i = 0; i < plan_.n; i++) {
        copy_row<V>(u.row(0, pair * plan_.n + i), u.height, plan_.Dp, flat.row(0, pair) + i * plan_.Dp * flat.height,
                    flat.height);
      }
    }
  }

  const Plan& plan_;
  int64_t elements_;
  bool keep_;
};

}  // namespace RMC_ISA
}  // namespace rmc
