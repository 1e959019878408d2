// The whole sequence of a tile.
#pragma once
#include "cell/gates.h"
#include "common/parallel.h"

namespace rmc {
namespace RMC_ISA {

constexpr int64_t kInputRows = 128;  // input rows that are projected together

template <class V>
class Forward {
 public:
  using T = typename V::T;

  Forward(Tile<V>& tile, T* saved) : tile_(tile), plan_(tile.plan), saved_(saved) {
    const int64_t per_step = tile.rows.elements * plan_.n;
    steps_ = saved ? plan_.chunk : kInputRows > per_step ? kInputRows / per_step : 1;
    if (steps_ > tile.end) steps_ = tile.end > 0 ? tile.end : 1;
    step_size_ = Activations<V>::size(plan_, tile.rows, saved != nullptr, 1);
  }

  void run() {
    Buffers b(*this);
    const TaskScratch memory(TaskScratch::kTile, measured([&](Bump& bump) { bind(bump, b); }));
    Bump bump(memory);
    bind(bump, b);
    Step<V> step(tile_, b.inputs, b.attention);
    point(b, 0);
    for (int64_t e = 0; e < tile_.rows.elements; e++) tile_.load_memory(tile_.initial_memory(e), e, b.now, 0);
    for (int64_t t0 = 0; t0 < tile_.end; t0 += steps_) {
      const int64_t count = tile_.end - t0 < steps_ ? tile_.end - t0 : steps_;
      rebind_inputs(b, count);
      tile_.clock.start();
      b.inputs.compute(tile_, t0, count);
      tile_.clock.end(Phase::kInput);
      for (int64_t s = 0; s < count; s++) {
        check_abandoned();
        one_step(b, step, t0, s);
      }
    }
    repeat_frozen();
    if (tile_.in.final_memory) repeat_last();
  }

 private:
  struct Buffers {
    Activations<V> now, next;
    InputRows<V> inputs;
    AttentionScratch<V> attention;
    Panels<V> candidate;
    T* activations = nullptr;
    Bump for_inputs;
    explicit Buffers(const Forward& f)
        : now(f.plan_, f.tile_.rows, f.saved_ != nullptr),
          next(f.plan_, f.tile_.rows, f.saved_ != nullptr),
          inputs(f.plan_, f.tile_.rows.elements, false) {}
  };

  void bind(Bump& bump, Buffers& b) {
    // Saving, one step more than is saved takes the memory after the last.
    b.activations = bump.take<T>(step_size_);
    b.candidate = {bump, tile_.rows.live, plan_.Dp};
    b.attention.bind(bump, plan_);
    b.for_inputs = bump;
    b.inputs.bind(bump, steps_);
  }

  // A shorter last chunk has panels of another height.
  void rebind_inputs(Buffers& b, int64_t count) {
    Bump bump = b.for_inputs;
    b.inputs.bind(bump, count);
  }

  // Where step t and the memory after it are kept.
  void point(Buffers& b, int64_t t) {
    if (!saved_ && t > 0) return;
    at_ = at(b, b.now, t);
    next_at_ = at(b, b.next, t + 1);
  }
  int64_t at(Buffers& b, Activations<V>& a, int64_t t) {
    if (!saved_ || t >= tile_.end) {
      a.bind(b.activations, step_size_, 1);
      return 0;
    }
    const int64_t t0 = t / plan_.chunk * plan_.chunk, left = tile_.end - t0;
    a.bind(saved_ + t0 * step_size_, (tile_.in.steps - t0) * step_size_, left < plan_.chunk ? left : plan_.chunk);
    return t - t0;
  }

  void one_step(Buffers& b, Step<V>& step, int64_t t0, int64_t s) {
    const int64_t t = t0 + s;
    point(b, t);
    for (int64_t e = 0; e < tile_.rows.elements; e++) {
      // Past its length an element computes with zeros, as it does where the backward pass recomputes: a NaN in its
      // memory would reach the weights' gradients by a product with 0.
      if (!tile_.runs(e, t)) {
        tile_.load_memory(nullptr, e, b.now, at_);
      } else if (tile_.resets(e, t)) {
        tile_.load_memory(tile_.reset_memory(e), e, b.now, at_);
      }
    }
    tile_.clock.end(Phase::kLoad);
    step.run(b.now, {at_, 1, t, s}, b.candidate);
    if (plan_.config.gate == Gate::kUnit && !saved_ && !plan_.live_inputs && all_run(t)) {
      for (int64_t p = 0; p < tile_.rows.slots.count; p++) new_panel(b, t, s, p);
    } else {
      for (int64_t e = 0; e < tile_.rows.elements; e++) {
        for (int64_t i = 0; i < plan_.N && tile_.runs(e, t); i++) new_memory(b, t, s, e, i);
      }
    }
    tile_.clock.end(Phase::kGates);
  }

  bool all_run(int64_t t) const {
    for (int64_t e = 0; e < tile_.rows.elements; e++) {
      if (!tile_.runs(e, t)) return false;
    }
    return true;
  }

  void new_panel(Buffers& b, int64_t t, int64_t s, int64_t p) {
    const Rows& slots = tile_.rows.slots;
    const T* input[V::kMaxRows];
    T* out[V::kMaxRows];
    const int64_t rows = slots.in_panel(p);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = p * slots.height + r, e = row / plan_.N;
      input[r] = b.inputs.gates.row(0, b.inputs.pair_index(s, e));
      out[r] = memories() + tile_.memory_offset(e, t) + row % plan_.N * plan_.D;
    }
    gate_panel<V>(plan_, rows, input, b.inputs.gates.chunk_stride(), b.now.gates.panel(p), b.candidate.panel(p),
                  b.now.memory.panel(p), slots.height, b.next.memory.panel(p), b.next.memory_tanh.panel(p), out);
  }

  void new_memory(Buffers& b, int64_t t, int64_t s, int64_t e, int64_t i) {
    const int64_t r = e * plan_.N + i, p = at_ * tile_.rows.slots.count, q = next_at_ * tile_.rows.slots.count;
    const int32_t height = b.now.memory.height;
    const T *memory = b.now.memory.row(p, r), *candidate = b.candidate.row(0, e * plan_.Q + i);
    T* next = b.next.memory.row(q, r);
    T* next_tanh = plan_.G ? b.next.memory_tanh.row(q, r) : nullptr;
    if (!plan_.G) {
      copy_row<V>(candidate, height, plan_.Dp, next, height);
    } else {
      const int64_t pair = b.inputs.pair_index(s, e);
      const auto row = saved_ ? gate_row<V, true> : gate_row<V, false>;
      row(plan_, b.inputs.gates.row(0, pair), b.inputs.gates.chunk_stride(), b.now.gates.row(p, r), candidate,
          saved_ ? b.now.candidate_tanh.row(p, r) : nullptr, memory, height, next, next_tanh);
    }
    store_row<V>(next, plan_.D, height, memories() + tile_.memory_offset(e, t) + i * plan_.D);
  }

  T* memories() const { return static_cast<T*>(tile_.in.memories); }

  // Past its end an element only repeats its memory.
  void repeat_frozen() {
    const int64_t size = plan_.N * plan_.D;
    for (int64_t e = 0; e < tile_.rows.elements; e++) {
      for (int64_t t = tile_.ends(e); t < tile_.in.steps; t++) {
        const T* from = t == 0 ? tile_.initial_memory(e) : memories() + tile_.memory_offset(e, t - 1);
        __builtin_memcpy(memories() + tile_.memory_offset(e, t), from, static_cast<size_t>(size) * sizeof(T));
      }
    }
  }

  void repeat_last() {
    const int64_t size = plan_.N * plan_.D;
    T* to = static_cast<T*>(tile_.in.final_memory) + tile_.first * size;
    for (int64_t e = 0; e < tile_.rows.elements; e++) {
      const T* from = memories() + tile_.memory_offset(e, tile_.in.steps - 1);
      __builtin_memcpy(to + e * size, from, static_cast<size_t>(size) * sizeof(T));
    }
  }

  Tile<V>& tile_;
  const Plan& plan_;
  T* saved_;
  int64_t steps_, step_size_, at_ = 0, next_at_ = 0;
};

}  // namespace RMC_ISA
}  // namespace rmc
