// One step of a tile backwards: from the gradient of the new memory to that of the old one and of the input rows.
#pragma once
#include "cell/gradients.h"

namespace rmc {
namespace RMC_ISA {

template <class V>
class StepBack {
 public:
  using T = typename V::T;

  // `sums`: the accumulator for the affine parts of the norms, laid out as gradients are.
  StepBack(Tile<V>& tile, const Step<V>& step, const InputRows<V>& inputs, const AttentionScratch<V>& scratch, T* sums)
      : tile_(tile), plan_(tile.plan), step_(step), inputs_(inputs), scratch_(scratch), sums_(sums) {}

  // g.memory holds the gradient of the new memory and receives that of the old. Elements past their length pass it on.
  void run(const Activations<V>& a, const ChunkGradients<V>& g, int64_t s, int64_t time) {
    gates(a, g, s, time);
    tile_.clock.end(Phase::kBackGates);
    for (int64_t b = plan_.blocks - 1; b >= 0; b--) block(a.block(b), plan_.block_at(b), g, g.block(b), s, time);
    memory(a, g, s, time);
    tile_.clock.end(Phase::kBackGates);
  }

 private:
  const Rows& live() const { return tile_.rows.live; }
  const Rows& slots() const { return tile_.rows.slots; }

  // From dM' to g.dout (the candidate's), g.carry (what f M passes on) and the gates' pre-activations.
  void gates(const Activations<V>& a, const ChunkGradients<V>& g, int64_t s, int64_t time) {
    const int64_t p = s * slots().count;
    for (int64_t e = 0; e < tile_.rows.elements; e++) {
      const int64_t pair = inputs_.pair_index(s, e);
      if (plan_.G) load_row<V>(nullptr, 0, 2 * plan_.Gp, g.input_gates.height, g.input_gates.row(0, pair));
      for (int64_t i = 0; i < plan_.Q; i++) {
        T* out = g.dout.row(0, e * plan_.Q + i);
        if (i >= plan_.N) {  // the rows of the input are not part of the new memory
          load_row<V>(nullptr, 0, plan_.Dp, g.dout.height, out);
          continue;
        }
        const int64_t r = e * plan_.N + i;
        const T* d = g.memory.row(0, r);
        if (!tile_.runs(e, time)) {
          load_row<V>(nullptr, 0, plan_.Dp, g.dout.height, out);
          copy_row<V>(d, g.memory.height, plan_.Dp, g.carry.row(0, r), g.carry.height);
          if (plan_.G) load_row<V>(nullptr, 0, 2 * plan_.Gp, g.gates.height, g.gates.row(p, r));
        } else if (!plan_.G) {
          copy_row<V>(d, g.memory.height, plan_.Dp, out, g.dout.height);
          load_row<V>(nullptr, 0, plan_.Dp, g.carry.height, g.carry.row(0, r));
        } else {
          gate_row_back(a, g, p, r, pair, out);
        }
      }
    }
  }

  void gate_row_back(const Activations<V>& a, const ChunkGradients<V>& g, int64_t p, int64_t r, int64_t pair,
                     T* out) const {
    const int64_t step = a.memory.chunk_stride(), pair_step = g.input_gates.chunk_stride();
    const int64_t chunks = plan_.Dp / V::W, forget = plan_.Gp / V::W;
    const T *d = g.memory.row(0, r), *m = a.memory.row(p, r), *gate = a.gates.row(p, r),
            *squashed = a.candidate_tanh.row(p, r);
    T *carry = g.carry.row(0, r), *dgate = g.gates.row(p, r), *input = g.input_gates.row(0, pair);
    const bool unit = plan_.config.gate == Gate::kUnit;
    const T* mask = static_cast<const T*>(plan_.memory_gate.in.mask);  // a gate of the whole row may be NaN
    const V one = V::set(1);
    V i = V::set(gate[0]), f = V::set(gate[forget * step]), total_i = V::zero(), total_f = V::zero();
    for (int64_t c = 0; c < chunks; c++) {
      if (unit) i = V::load(gate + c * step), f = V::load(gate + (forget + c) * step);
      const V dm = V::load(d + c * step), u = V::load(squashed + c * step);
      const V di = dm * i, df = dm * f;
      const V gi = di * u * (one - i), gf = df * V::load(m + c * step) * (one - f);
      without_padding(df, mask, c * V::W).store(carry + c * step);
      without_padding(di * fnma(u, u, one), mask, c * V::W).store(out + c * step);
      if (unit) {
        put_gate(gi, dgate + c * step, input + c * pair_step);
        put_gate(gf, dgate + (forget + c) * step, input + (forget + c) * pair_step);
      } else {
        total_i = total_i + gi;
        total_f = total_f + gf;
      }
    }
    if (!unit) {
      T lane[V::W] = {};
      lane[0] = sum(total_i);
      put_gate(V::load(lane), dgate, input);
      lane[0] = sum(total_f);
      put_gate(V::load(lane), dgate + forget * step, input + forget * pair_step);
    }
  }

  static void put_gate(V x, T* gate, T* input) {
    x.store(gate);
    (V::load(input) + x).store(input);
  }

  // g.dout: gradient of the block's output; becomes that of its input.
  void block(const BlockActivations<V>& a, const Block& params, const ChunkGradients<V>& g, const BlockGradients<V>& bg,
             int64_t s, int64_t time) {
    const int64_t p = s * live().count, panels = live().count;
    const Weights<V>& w = tile_.weights;
    norm(g.dout, a.out_hat, s, a.out_rstd, false, params.mlp_norm);
    tile_.clock.end(Phase::kBackNorm);
    mlp(a, g, bg, p);
    tile_.clock.end(Phase::kBackMlp);
    norm(g.dout, a.mixed_hat, s, a.mixed_rstd, false, params.attention_norm);
    tile_.clock.end(Phase::kBackNorm);
    Panels<V> heads = g.dout;
    if (plan_.config.output_projection) {
      copy(g.dout, 0, bg.output, p);
      w.multiply_back(params.output, {g.dout, 0, nullptr, g.hidden, 0, panels});
      heads = g.hidden;
      tile_.clock.end(Phase::kBackMlp);
    }
    for (int64_t e = 0; e < tile_.rows.elements; e++) attend_element_back(a, g, bg, heads, s, e, time);
    tile_.clock.end(Phase::kBackAttention);
    norm({bg.qkv, p}, {a.raw, p}, s, a.qkv_rstd, !plan_.config.joint_norm, params.qkv_norm);
    tile_.clock.end(Phase::kBackNorm);
    w.multiply_back(params.qkv, {bg.qkv, p, nullptr, g.dout, 0, panels,
                                 plan_.config.attention_residual ? Start::kAccumulate : Start::kBias});
    tile_.clock.end(Phase::kBackQkv);
  }

  void mlp(const BlockActivations<V>& a, const ChunkGradients<V>& g, const BlockGradients<V>& bg, int64_t p) {
    const int64_t panels = live().count;
    const Weights<V>& w = tile_.weights;
    const int64_t top = plan_.L - 1;
    if (plan_.config.relu_last) {
      masked(g.dout, 0, a.layer(top, true), p, bg.layer(top), p);
    } else {
      copy(g.dout, 0, bg.layer(top), p);
    }
    for (int64_t l = top; l > 0; l--) {
      const Panels<V> below = bg.layer(l - 1);
      w.multiply_back(plan_.layer_at(l), {bg.layer(l), p, nullptr, below, p, panels});
      masked(below, p, a.layer(l - 1, true), p, below, p);
    }
    w.multiply_back(plan_.layer_at(0), {bg.layer(0), p, nullptr, g.dout, 0, panels, Start::kAccumulate});
  }

  void copy(const Panels<V>& from, int64_t first_from, const Panels<V>& to, int64_t first_to) const {
    const int64_t size = live().count * from.stride();
    __builtin_memcpy(to.panel(first_to), from.panel(first_from), static_cast<size_t>(size) * sizeof(T));
  }

  // to = from where `activation` > 0 (the gradient of relu, whose output that is), else 0.
  void masked(const Panels<V>& from, int64_t first_from, const Panels<V>& activation, int64_t first_activation,
              const Panels<V>& to, int64_t first_to) const {
    for (int64_t p = 0; p < live().count; p++) {
      const T *x = from.panel(first_from + p), *h = activation.panel(first_activation + p);
      T* y = to.panel(first_to + p);
      const int64_t rows = live().in_panel(p) * V::W;
      for (int64_t c = 0; c < plan_.Dp; c += V::W) {
        for (int64_t i = c * from.height; i < c * from.height + rows; i += V::W)
          zero_unless_positive(V::load(h + i), V::load(x + i)).store(y + i);
      }
    }
  }

  void attend_element_back(const BlockActivations<V>& a, const ChunkGradients<V>& g, const BlockGradients<V>& bg,
                           const Panels<V>& heads, int64_t s, int64_t e, int64_t time) const {
    step_.find_keys(a.qkv, s, s, e, inputs_.qkv, scratch_.keys);
    step_.find_keys(bg.qkv, s, s, e, g.input_qkv, scratch_.grads);
    for (int64_t i = plan_.Q; i < plan_.S; i++) {  // the queries of rows that only serve as keys
      for (int64_t h = 0; h < plan_.H; h++) {
        for (int64_t c = 0; c < plan_.Kp; c += V::W)
          V::zero().store(scratch_.grads[i].data + (h * plan_.head_stride + c) / V::W * scratch_.grads[i].step);
      }
    }
    for (int64_t i = 0; i < plan_.Q; i++) scratch_.outputs[i] = {heads.row(0, e * plan_.Q + i), heads.chunk_stride()};
    const T* weights = a.weights + (s * tile_.rows.elements + e) * plan_.S * plan_.lane_stride;
    attend_back(plan_, scratch_, weights, tile_.runs(e, time) ? tile_.mask(e, time) : nullptr);
  }

  void norm(const Window<V>& d, const Window<V>& hat, int64_t s, const T* rstd, bool raw, const Norm& n) const {
    if (n.weight < 0) return;
    const Affine<T> affine(n, tile_.weights.packed);
    T *dgamma = sums_ + n.grad_gamma, *dbeta = sums_ + n.grad_beta;
    if (plan_.config.joint_norm) {
      norm_elements_back<V>(d, hat, rstd + s * Activations<V>::rstd_stride(tile_.rows), affine, dgamma, dbeta,
                            tile_.rows, plan_.Q);
    } else {
      norm_rows_back<V>(d, hat, raw, rstd + s * live().count * live().height, affine, dgamma, dbeta, live(),
                        live().count);
    }
  }
  void norm(const Panels<V>& d, const Panels<V>& hat, int64_t s, const T* rstd, bool raw, const Norm& n) const {
    norm(Window<V>{d, 0}, Window<V>{hat, s * live().count}, s, rstd, raw, n);
  }

  // g.memory = carry + what attention and the gates pass on; input rows of live tiles go to g.input_u.
  void memory(const Activations<V>& a, const ChunkGradients<V>& g, int64_t s, int64_t time) {
    const int64_t p = s * slots().count, step = a.memory.chunk_stride();
    if (plan_.G) {
      tile_.weights.multiply_back(plan_.memory_gate, {g.gates, p, nullptr, g.from_gates, 0, slots().count});
      tile_.clock.end(Phase::kBackGateProduct);
    }
    const V one = V::set(1);
    for (int64_t e = 0; e < tile_.rows.elements; e++) {
      for (int64_t i = 0; i < plan_.N; i++) {
        const int64_t r = e * plan_.N + i;
        const T *carry = g.carry.row(0, r), *attention = g.dout.row(0, e * plan_.Q + i);
        const T *squashed = plan_.G ? a.memory_tanh.row(p, r) : nullptr,
                *product = plan_.G ? g.from_gates.row(0, r) : nullptr;
        T* out = g.memory.row(0, r);
        const bool runs = tile_.runs(e, time);
        for (int64_t c = 0; c < plan_.Dp / V::W; c++) {
          V d = V::load(carry + c * step);
          if (runs) {
            d = d + V::load(attention + c * step);
            if (plan_.G) {
              const V u = V::load(squashed + c * step);
              d = fma(V::load(product + c * step), fnma(u, u, one), d);
            }
          }
          d.store(out + c * step);
        }
      }
      for (int64_t i = plan_.N; i < plan_.Q; i++) {
        copy_row<V>(g.dout.row(0, e * plan_.Q + i), g.dout.height, plan_.Dp,
                    g.input_u.row(0, inputs_.row_index(s, e, i - plan_.N)), g.input_u.height);
      }
    }
  }

  Tile<V>& tile_;
  const Plan& plan_;
  const Step<V>& step_;
  const InputRows<V>& inputs_;
  const AttentionScratch<V>& scratch_;
  T* sums_;
};

}  // namespace RMC_ISA
}  // namespace rmc
