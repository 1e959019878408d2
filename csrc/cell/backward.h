// A tile's sequence backwards, in chunks of steps: recompute (or read) their activations, walk back through them one by
// one, then take all products that do not depend on the order of steps for the whole chunk.
#pragma once
#include "cell/gates.h"
#include "cell/step_back.h"
#include "common/parallel.h"

namespace rmc {
namespace RMC_ISA {

template <class V>
class Backward {
 public:
  using T = typename V::T;

  // `sums`: room for one chunk's affine gradients; `total`: where weight gradients are added.
  Backward(Tile<V>& tile, const CellGradients& out, T* sums, T* total)
      : tile_(tile), plan_(tile.plan), out_(out), sums_(sums), total_(total) {
    steps_ = plan_.chunk < tile.end ? plan_.chunk : tile.end > 0 ? tile.end : 1;
  }

  void run(T* saved) {
    Buffers b(*this);
    const TaskScratch memory(TaskScratch::kTile, measured([&](Bump& bump) { bind(bump, b, saved != nullptr); }));
    Bump bump(memory);
    bind(bump, b, saved != nullptr);
    frozen_tail(b);
    const int64_t last = tile_.end > 0 ? (tile_.end - 1) / plan_.chunk * plan_.chunk : -1;
    for (int64_t t0 = last; t0 >= 0; t0 -= plan_.chunk) {
      const int64_t count = tile_.end - t0 < plan_.chunk ? tile_.end - t0 : plan_.chunk;
      chunk(b, t0, count, saved);
    }
    finish(b);
  }

 private:
  struct Buffers {
    Activations<V> now;
    InputRows<V> inputs;
    AttentionScratch<V> attention;
    ChunkGradients<V> grads;
    Panels<V> candidate;
    T* activations = nullptr;
    int64_t size = 0;  // of `activations`, in elements
    Bump for_chunk;
    Panels<V> memory;  // its gradient, which goes on from chunk to chunk
    explicit Buffers(const Backward& f)
        : now(f.plan_, f.tile_.rows, true), inputs(f.plan_, f.tile_.rows.elements, true) {}
  };

  void bind(Bump& bump, Buffers& b, bool saved) {
    b.attention.bind(bump, plan_);
    if (!saved) {
      b.size = Activations<V>::size(plan_, tile_.rows, true, steps_);
      b.activations = bump.take<T>(b.size);
      b.candidate = {bump, tile_.rows.live, plan_.Dp, steps_};
    }
    b.memory = {bump, tile_.rows.slots, plan_.Dp};
    b.for_chunk = bump;
    bind_chunk(bump, b, steps_);
  }
  void bind_chunk(Bump& bump, Buffers& b, int64_t count) {
    b.inputs.bind(bump, count);
    b.grads.bind(bump, plan_, tile_.rows, count, b.inputs);
    b.grads.memory = b.memory;
  }

  const T* dout(int64_t e, int64_t t) const { return static_cast<const T*>(out_.memories) + tile_.memory_offset(e, t); }

  // Starts the memory's gradient with everything that arrives past the last step of the tile.
  void frozen_tail(Buffers& b) {
    const int64_t size = tile_.rows.slots.count * b.grads.memory.stride();
    for (int64_t i = 0; i < size; i += V::W) V::zero().store(b.grads.memory.data + i);
    for (int64_t t = tile_.in.steps - 1; t >= tile_.end; t--) {
      for (int64_t e = 0; e < tile_.rows.elements; e++) add_dout(b, e, t);
    }
  }
  void add_dout(Buffers& b, int64_t e, int64_t t) {
    constexpr int64_t W = V::W;
    for (int64_t i = 0; i < plan_.N; i++) {
      const T* from = dout(e, t) + i * plan_.D;
      T* to = b.grads.memory.row(0, e * plan_.N + i);
      const int64_t height = b.grads.memory.height;
      int64_t c = 0;
      for (; c + W <= plan_.D; c += W) (V::load(to + c * height) + V::load(from + c)).store(to + c * height);
      if (c < plan_.D) (V::load(to + c * height) + V::load_n(from + c, plan_.D - c)).store(to + c * height);
    }
  }

  void chunk(Buffers& b, int64_t t0, int64_t count, T* saved) {
    Bump bump = b.for_chunk;
    bind_chunk(bump, b, count);
    tile_.clock.start();
    b.inputs.compute(tile_, t0, count);
    tile_.clock.end(Phase::kInput);
    Step<V> step(tile_, b.inputs, b.attention);
    const int64_t step_size = Activations<V>::size(plan_, tile_.rows, true, 1);
    if (saved) {
      b.now.bind(saved + t0 * step_size, (tile_.in.steps - t0) * step_size, count);
    } else {
      b.now.bind(b.activations, b.size, count);
      recompute(b, step, t0, count);
    }
    for (int64_t i = 0; i < plan_.norm_gradient_size; i += V::W) V::zero().store(sums_ + i);
    StepBack<V> back(tile_, step, b.inputs, b.attention, sums_);
    for (int64_t s = count - 1; s >= 0; s--) {
      check_abandoned();
      for (int64_t e = 0; e < tile_.rows.elements; e++) add_dout(b, e, t0 + s);
      back.run(b.now, b.grads, s, t0 + s);
      add_norm_sums();
      if (tile_.in.resets) leave_episodes(b, t0 + s);
    }
    input_back(b, t0, count);
    tile_.clock.end(Phase::kBackInput);
    weight_gradients(b, count);
    tile_.clock.end(Phase::kWeightGradient);
  }

  void recompute(Buffers& b, Step<V>& step, int64_t t0, int64_t count) {
    const T* memories = static_cast<const T*>(tile_.in.memories);
    for (int64_t s = 0; s < count; s++) {
      const int64_t t = t0 + s;
      for (int64_t e = 0; e < tile_.rows.elements; e++) {
        const T* from = tile_.resets(e, t) ? tile_.reset_memory(e)
                        : t == 0           ? tile_.initial_memory(e)
                                           : memories + tile_.memory_offset(e, t - 1);
        tile_.load_memory(tile_.runs(e, t) ? from : nullptr, e, b.now, s);
      }
    }
    tile_.clock.end(Phase::kLoad);
    step.run(b.now, {0, count, t0, 0}, b.candidate);
    if (plan_.G) {
      for (int64_t s = 0; s < count; s++) {
        for (int64_t r = 0; r < tile_.rows.slots.rows; r++) regate(b, s, r);
      }
    }
    tile_.clock.end(Phase::kGates);
  }
  void regate(Buffers& b, int64_t s, int64_t r) const {
    const int64_t p = s * tile_.rows.slots.count, e = r / plan_.N;
    gate_row<V, true>(plan_, b.inputs.gates.row(0, b.inputs.pair_index(s, e)), b.inputs.gates.chunk_stride(),
                      b.now.gates.row(p, r), b.candidate.row(s * tile_.rows.live.count, e * plan_.Q + r % plan_.N),
                      b.now.candidate_tanh.row(p, r), nullptr, b.now.memory.height, nullptr, nullptr);
  }

  // Before a reset the gradient belongs to the reset memory, not to the memory carried in.
  void leave_episodes(Buffers& b, int64_t t) {
    constexpr int64_t W = V::W;
    for (int64_t e = 0; e < tile_.rows.elements; e++) {
      if (!tile_.resets(e, t)) continue;
      T* to = out_.reset_memory ? static_cast<T*>(out_.reset_memory) + (tile_.first + e) * plan_.N * plan_.D : nullptr;
      for (int64_t i = 0; i < plan_.N; i++) {
        T* d = b.grads.memory.row(0, e * plan_.N + i);
        for (int64_t c = 0; to && c < plan_.D; c++)
          to[i * plan_.D + c] += d[c / W * b.grads.memory.chunk_stride() + c % W];
        load_row<V>(nullptr, 0, plan_.Dp, b.grads.memory.height, d);
      }
    }
  }

  void finish(Buffers& b) {
    if (!out_.memory) return;
    T* to = static_cast<T*>(out_.memory) + tile_.first * plan_.N * plan_.D;
    for (int64_t r = 0; r < tile_.rows.slots.rows; r++)
      store_row<V>(b.grads.memory.row(0, r), plan_.D, b.grads.memory.height, to + r * plan_.D);
  }

  // The input rows of the chunk: from their keys, values and gate terms to u and x.
  void input_back(Buffers& b, int64_t t0, int64_t count) {  // live tiles have left their input rows' gradient in u
    const Weights<V>& w = tile_.weights;
    ChunkGradients<V>& g = b.grads;
    const Rows &rows = b.inputs.rows, &pairs = b.inputs.pairs;
    if (!plan_.live_inputs) {
      const Block& block = plan_.block_at(0);
      if (plan_.config.qkv_norm) {
        norm_rows_back<V>({g.input_qkv, 0}, {b.inputs.raw, 0}, true, b.inputs.rstd, Affine<T>(block.qkv_norm, w.packed),
                          sums_ + block.qkv_norm.grad_gamma, sums_ + block.qkv_norm.grad_beta, rows, rows.count);
      }
      w.multiply_back(block.qkv, {g.input_qkv, 0, nullptr, g.input_u, 0, rows.count});
    }
    if (plan_.G) {
      const Linear& gate = plan_.input_gate;
      if (plan_.n == 1) {
        w.multiply_back(gate, {g.input_gates, 0, nullptr, g.input_u, 0, pairs.count, Start::kAccumulate});
      } else {
        w.multiply_back(gate, {g.input_gates, 0, nullptr, g.input_flat, 0, pairs.count});
        add_flat(b, count);
      }
    }
    if (!out_.x) return;
    if (plan_.config.input_projection) w.multiply_back(plan_.input, {g.input_u, 0, nullptr, g.input_x, 0, rows.count});
    store_input(b, t0, count);
  }
  void add_flat(Buffers& b, int64_t count) const {
    for (int64_t pair = 0; pair < count * tile_.rows.elements; pair++) {
      for (int64_t i = 0; i < plan_.n; i++) {
        const Panels<V>& flat = b.grads.input_flat;
        const T* from = flat.row(0, pair) + i * plan_.Dp * flat.height;
        T* to = b.grads.input_u.row(0, pair * plan_.n + i);
        for (int64_t c = 0; c < plan_.Dp; c += V::W) {
          T* at = to + c * b.grads.input_u.height;
          (V::load(at) + V::load(from + c * flat.height)).store(at);
        }
      }
    }
  }
  void store_input(Buffers& b, int64_t t0, int64_t count) const {
    const Panels<V>& x = b.grads.input_x;
    for (int64_t s = 0; s < count; s++) {
      for (int64_t e = 0; e < tile_.rows.elements; e++) {
        if (!tile_.runs(e, t0 + s)) continue;  // stays 0
        T* to = static_cast<T*>(out_.x) + ((tile_.first + e) * tile_.in.steps + t0 + s) * plan_.n * plan_.I;
        for (int64_t i = 0; i < plan_.n; i++)
          store_row<V>(x.row(0, b.inputs.row_index(s, e, i)), plan_.I, x.height, to + i * plan_.I);
      }
    }
  }

  bool wanted(int param) const { return out_.params && out_.params[param]; }

  void add_linear(const Linear& l, const Panels<V>& dy, const Panels<V>& x, int64_t panels) const {
    if (wanted(l.weight)) weight_gradient<V>(dy, x, panels, total_ + l.grad);
    if (wanted(l.bias_param)) column_sums<V>(dy, panels, total_ + l.grad_bias);
  }

  void weight_gradients(Buffers& b, int64_t count) const {
    const int64_t live = count * tile_.rows.live.count, slots = count * tile_.rows.slots.count;
    const int64_t inputs = b.inputs.rows.count, pairs = b.inputs.pairs.count;
    const ChunkGradients<V>& g = b.grads;
    for (int64_t i = 0; i < plan_.blocks; i++) {
      const Block& params = plan_.block_at(i);
      const BlockActivations<V> a = b.now.block(i);
      const BlockGradients<V> bg = g.block(i);
      add_linear(params.qkv, bg.qkv, a.input, live);
      if (plan_.config.output_projection) add_linear(params.output, bg.output, a.attended, live);
      for (int64_t l = 0; l < plan_.L; l++) {
        add_linear(plan_.layer_at(l), bg.layer(l), l == 0 ? a.mixed : a.layer(l - 1, true), live);
      }
    }
    if (!plan_.live_inputs) add_linear(plan_.block_at(0).qkv, g.input_qkv, b.inputs.u, inputs);
    if (plan_.config.input_projection) add_linear(plan_.input, g.input_u, b.inputs.x, inputs);
    if (plan_.G) {
      const Linear &from_input = plan_.input_gate, &from_memory = plan_.memory_gate;
      if (wanted(from_input.weight)) weight_gradient<V>(g.input_gates, b.inputs.flat, pairs, total_ + from_input.grad);
      if (wanted(from_memory.weight)) weight_gradient<V>(g.gates, b.now.memory_tanh, slots, total_ + from_memory.grad);
      // Every bias of the gates has this gradient (cell/run.h).
      column_sums<V>(g.input_gates, pairs, total_ + from_input.grad_bias);
    }
    add_norm_sums();
  }

  // After each step: one sum over the rows of many steps is 1.6 times as inexact as PyTorch's, which adds up steps.
  void add_norm_sums() const {
    for (int64_t i = 0; i < plan_.norm_gradient_size; i += V::W) {
      (V::load(total_ + i) + V::load(sums_ + i)).store(total_ + i);
      V::zero().store(sums_ + i);
    }
  }

  Tile<V>& tile_;
  const Plan& plan_;
  const CellGradients& out_;
  T *sums_, *total_;
  int64_t steps_;
};

}  // namespace RMC_ISA
}  // namespace rmc
