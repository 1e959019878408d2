// What one or several steps of a tile compute. The forward pass reuses one step of it; saved activations and the
// recomputation of the backward pass hold several steps and keep every buffer apart, in the same layout.
#pragma once
#include "cell/kernels.h"
#include "cell/plan.h"
#include "common/bump.h"
#include "gemm/panels.h"

namespace rmc {
namespace RMC_ISA {

// The rows of a tile of `elements` batch elements: its memory slots, and the rows that attention and MLP work on (the
// slots again, or slots and input rows).
struct TileRows {
  int64_t elements = 0;
  Rows slots, live;

  TileRows(const Plan& plan, int64_t count) : elements(count) {
    const int32_t height = panel_height(count * plan.Q, plan.max_rows);
    slots = {count * plan.N, (count * plan.N + height - 1) / height, height};
    live = {count * plan.Q, (count * plan.Q + height - 1) / height, height};
  }
};

template <class V>
struct BlockActivations {
  using T = typename V::T;
  Panels<V> input;               // rows that enter the block
  Panels<V> raw;                 // q | k | v before its LayerNorm; joint norms replace it by the normalised values
  Panels<V> qkv;                 // after it
  Panels<V> attended;            // concatenated heads, before an output projection
  Panels<V> mixed;               // after attention, residual and norm: the MLP's input
  Panels<V> mixed_hat, out_hat;  // normalised values before the affine part
  T *qkv_rstd = nullptr, *mixed_rstd = nullptr, *out_rstd = nullptr;  // per row, or per element for joint norms
  T* weights = nullptr;                                               // attention [steps, elements, S, lane_stride]
  Panels<V> hidden;  // of layer 0; layer l is l * hidden_stride further
  int64_t hidden_stride = 0;

  Panels<V> layer(int64_t l, bool keep) const {
    Panels<V> h = hidden;
    h.data += (keep ? l : l % 2) * hidden_stride;
    return h;
  }
};

template <class V>
class Activations {
 public:
  using T = typename V::T;
  Panels<V> memory, memory_tanh;  // before the step
  Panels<V> gates;                // pre-activations, then (kept) sigmoid(i) | sigmoid(f)
  Panels<V> candidate_tanh;

  Activations(const Plan& plan, const TileRows& rows, bool keep) : plan_(plan), rows_(rows), keep_(keep) {}

  // `steps` steps in memory of `size` elements; a null base only measures.
  void bind(T* base, int64_t size, int64_t steps) {
    Bump bump(base, static_cast<size_t>(size) * sizeof(T));
    steps_ = steps;
    memory = slots(bump, plan_.Dp);
    if (plan_.G) {
      memory_tanh = slots(bump, plan_.Dp);
      gates = slots(bump, 2 * plan_.Gp);
      if (keep_) candidate_tanh = slots(bump, plan_.Dp);
    }
    size_t block_bytes = 0;
    for (int64_t b = 0; b < plan_.blocks; b++) {
      const size_t before = bump.used();
      const BlockActivations<V> block = bind_block(bump);
      if (b == 0) first_ = block;
      block_bytes = bump.used() - before;
      if (!keep_) break;
    }
    block_stride_ = static_cast<int64_t>(block_bytes / sizeof(T));
    used_ = static_cast<int64_t>(bump.used() / sizeof(T));
  }

  BlockActivations<V> block(int64_t b) const {
    BlockActivations<V> a = first_;
    const int64_t shift = keep_ ? b * block_stride_ : 0;
    for (Panels<V>* p : {&a.input, &a.raw, &a.qkv, &a.attended, &a.mixed, &a.mixed_hat, &a.out_hat, &a.hidden}) {
      if (p->data) p->data += shift;
    }
    for (T** p : {&a.qkv_rstd, &a.mixed_rstd, &a.out_rstd, &a.weights}) {
      if (*p) *p += shift;
    }
    if (!plan_.live_inputs) a.input = memory;
    return a;
  }

  // Elements that `steps` steps take: linear in the steps.
  static int64_t size(const Plan& plan, const TileRows& rows, bool keep, int64_t steps) {
    Activations a(plan, rows, keep);
    a.bind(nullptr, 0, steps);
    return a.used_;
  }

  bool keeps() const { return keep_; }

 private:
  Panels<V> slots(Bump& bump, int64_t columns) const { return {bump, rows_.slots, columns, steps_}; }
  Panels<V> live(Bump& bump, int64_t columns) const { return {bump, rows_.live, columns, steps_}; }
  // Room for one number per padded row, in whole cache lines per step.
  T* per_row(Bump& bump) const { return bump.take<T>(steps_ * rstd_stride(rows_)); }

  BlockActivations<V> bind_block(Bump& bump) const {
    const CellConfig& c = plan_.config;
    BlockActivations<V> a;
    if (plan_.live_inputs) a.input = live(bump, plan_.Dp);
    a.raw = live(bump, plan_.Fp);
    a.qkv = c.qkv_norm && keep_ ? live(bump, plan_.Fp) : a.raw;
    if (c.output_projection) a.attended = live(bump, plan_.Dp);
    a.mixed = live(bump, plan_.Dp);
    if (keep_ && c.attention_norm) a.mixed_hat = live(bump, plan_.Dp);
    if (keep_ && c.mlp_norm) a.out_hat = live(bump, plan_.Dp);
    a.weights = bump.take<T>(steps_ * rows_.elements * plan_.S * plan_.lane_stride);
    const size_t before = bump.used();
    a.hidden = live(bump, plan_.Dp);
    a.hidden_stride = static_cast<int64_t>((bump.used() - before) / sizeof(T));
    const int64_t layers = plan_.L - (c.relu_last ? 0 : 1);  // a last layer without ReLU leaves nothing to keep
    for (int64_t l = 1; l < (keep_ ? layers : 2); l++) live(bump, plan_.Dp);
    if (keep_) a.qkv_rstd = per_row(bump), a.mixed_rstd = per_row(bump), a.out_rstd = per_row(bump);
    return a;
  }

 public:
  static int64_t rstd_stride(const TileRows& rows) {
    constexpr int64_t line = 64 / sizeof(T);
    return (rows.live.count * rows.live.height + line - 1) / line * line;
  }

 private:
  const Plan& plan_;
  TileRows rows_;
  bool keep_;
  int64_t steps_ = 0, block_stride_ = 0, used_ = 0;
  BlockActivations<V> first_;
};

// An upper bound that is linear in elements and tiles; see ActivationSize.
template <class V>
ActivationSize activation_size(const Plan& plan) {
  // A tile of g elements takes at most what its rows, one more panel of them, and its attention weights take.
  TileRows full(plan, plan.group);
  const int64_t one = Activations<V>::size(plan, full, true, 1);
  ActivationSize size;
  size.per_tile = 0;
  size.per_element = (one + plan.group - 1) / plan.group;
  for (int64_t count = 1; count < plan.group; count++) {
    const int64_t over = Activations<V>::size(plan, TileRows(plan, count), true, 1) - count * size.per_element;
    if (over > size.per_tile) size.per_tile = over;
  }
  return size;
}

}  // namespace RMC_ISA
}  // namespace rmc
