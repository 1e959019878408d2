// One step of the cell up to its candidate memory, for one or (recomputing) several steps of a tile at once.
#pragma once
#include "cell/attention.h"
#include "cell/input_rows.h"

namespace rmc {
namespace RMC_ISA {

// Which steps: `count` of them from step `at` of the activations; time `time`, step `input` of the input rows.
struct StepRange {
  int64_t at = 0, count = 1, time = 0, input = 0;
};

template <class V>
class Step {
 public:
  using T = typename V::T;

  Step(Tile<V>& tile, const InputRows<V>& inputs, const AttentionScratch<V>& scratch)
      : tile_(tile), plan_(tile.plan), inputs_(inputs), scratch_(scratch) {}

  // Fills the activations of the range; the candidate memory is left in `out`, whose panel 0 is the range's first.
  void run(const Activations<V>& a, const StepRange& range, const Panels<V>& out) {
    if (plan_.live_inputs) join_rows(a, range);
    for (int64_t b = 0; b < plan_.blocks; b++) {
      const BlockActivations<V> block = a.block(b);
      project_and_attend(block, plan_.block_at(b), a.keeps(), range);
      const bool last = b + 1 == plan_.blocks;
      const Window<V> target = last ? Window<V>{out, 0} : Window<V>{a.block(b + 1).input, first(range)};
      mlp(block, plan_.block_at(b), a.keeps(), range, out, target);
    }
    if (plan_.G) {
      const int64_t p = range.at * tile_.rows.slots.count;
      tile_.weights.multiply(plan_.memory_gate,
                             {a.memory_tanh, p, nullptr, a.gates, p, range.count * tile_.rows.slots.count});
      tile_.clock.end(Phase::kGateProduct);
    }
  }

  // keys of element e at step `at` of the activations: its live rows, then the input rows that only serve as keys.
  void find_keys(const Panels<V>& live, int64_t at, int64_t input, int64_t e, const Panels<V>& from_input,
                 StridedRow<T>* keys) const {
    const int64_t p = at * tile_.rows.live.count;
    for (int64_t i = 0; i < plan_.Q; i++) keys[i] = {live.row(p, e * plan_.Q + i), live.chunk_stride()};
    for (int64_t i = plan_.Q; i < plan_.S; i++) {
      keys[i] = {from_input.row(0, inputs_.row_index(input, e, i - plan_.Q)), from_input.chunk_stride()};
    }
  }

 private:
  const Rows& live() const { return tile_.rows.live; }
  int64_t first(const StepRange& range) const { return range.at * live().count; }

  // Memory rows and input rows in one matrix.
  void join_rows(const Activations<V>& a, const StepRange& range) const {
    const Panels<V> input = a.block(0).input;
    for (int64_t s = 0; s < range.count; s++) {
      const int64_t p = (range.at + s) * live().count, m = (range.at + s) * tile_.rows.slots.count;
      for (int64_t e = 0; e < tile_.rows.elements; e++) {
        for (int64_t i = 0; i < plan_.S; i++) {
          T* to = input.row(p, e * plan_.S + i);
          if (i < plan_.N) {
            copy_row<V>(a.memory.row(m, e * plan_.N + i), a.memory.height, plan_.Dp, to, input.height);
          } else {
            copy_row<V>(inputs_.u.row(0, inputs_.row_index(range.input + s, e, i - plan_.N)), inputs_.u.height,
                        plan_.Dp, to, input.height);
          }
        }
      }
    }
  }

  void project_and_attend(const BlockActivations<V>& a, const Block& block, bool keep, const StepRange& range) {
    const Weights<V>& w = tile_.weights;
    const int64_t p = first(range), panels = range.count * live().count;
    w.multiply(block.qkv, {a.input, p, w.bias(block.qkv), a.raw, p, panels});
    tile_.clock.end(Phase::kQkv);
    if (plan_.config.qkv_norm) {
      // A joint norm has a mean to subtract: its normalised values replace the raw ones where they are kept.
      const Window<V> raw{a.raw, p}, hat = keep && plan_.config.joint_norm ? raw : Window<V>{};
      norm(raw, {}, block.qkv_norm, !plan_.config.joint_norm, hat, {a.qkv, p}, keep ? a.qkv_rstd : nullptr, range);
      tile_.clock.end(Phase::kQkvNorm);
    }
    for (int64_t s = 0; s < range.count; s++) {
      for (int64_t e = 0; e < tile_.rows.elements; e++) attend_element(a, range, s, e);
    }
    tile_.clock.end(Phase::kAttention);
    const Window<V> mixed{a.mixed, p}, residual = plan_.config.attention_residual ? Window<V>{a.input, p} : Window<V>{};
    if (plan_.config.output_projection) {
      w.multiply(block.output, {a.attended, p, w.bias(block.output), a.mixed, p, panels});
      tile_.clock.end(Phase::kOutput);
    }
    combine(mixed, residual, block.attention_norm, {a.mixed_hat, p}, mixed, keep ? a.mixed_rstd : nullptr, range);
  }

  void attend_element(const BlockActivations<V>& a, const StepRange& range, int64_t s, int64_t e) const {
    find_keys(a.qkv, range.at + s, range.input + s, e, inputs_.qkv, scratch_.keys);
    const Panels<V>& to = plan_.config.output_projection ? a.attended : a.mixed;
    const int64_t p = (range.at + s) * live().count;
    for (int64_t i = 0; i < plan_.Q; i++) scratch_.outputs[i] = {to.row(p, e * plan_.Q + i), to.chunk_stride()};
    T* weights = a.weights + ((range.at + s) * tile_.rows.elements + e) * plan_.S * plan_.lane_stride;
    const T* mask = tile_.runs(e, range.time + s) ? tile_.mask(e, range.time + s) : nullptr;
    attend(plan_, scratch_, weights, mask);
  }

  // `spare` takes the output of the last layer where nothing has to be kept.
  void mlp(const BlockActivations<V>& a, const Block& block, bool keep, const StepRange& range, const Panels<V>& spare,
           const Window<V>& target) {
    const int64_t p = first(range), panels = range.count * live().count;
    Window<V> from{a.mixed, p};
    for (int64_t l = 0; l < plan_.L; l++) {
      const Linear& layer = plan_.layer_at(l);
      const bool last = l + 1 == plan_.L, relu = !last || plan_.config.relu_last;
      const bool kept = !last || (relu && keep);
      const Window<V> to = kept ? Window<V>{a.layer(l, keep), p} : Window<V>{spare, 0};
      tile_.weights.multiply(
          layer, {from.matrix, from.first, tile_.weights.bias(layer), to.matrix, to.first, panels, Start::kBias, relu});
      from = to;
    }
    tile_.clock.end(Phase::kMlp);
    combine(from, {a.mixed, p}, block.mlp_norm, {a.out_hat, p}, target, keep ? a.out_rstd : nullptr, range);
  }

  // out = y + residual, normalised where the variant does.
  void combine(const Window<V>& y, const Window<V>& residual, const Norm& n, const Window<V>& hat, const Window<V>& out,
               T* rstd, const StepRange& range) {
    if (n.weight >= 0) {
      norm(y, residual, n, false, hat, out, rstd, range);
    } else if (residual.matrix) {
      for (int64_t p = 0; p < range.count * live().count; p++) {
        const int64_t rows = live().in_panel(p);
        for (int32_t i = 0; i < rows; i++)
          add_and_sum<V>(y.row(p, i), residual.row(p, i), plan_.Dp, live().height, T(1), out.row(p, i));
      }
    }
    tile_.clock.end(Phase::kNorm);
  }

  void norm(const Window<V>& y, const Window<V>& residual, const Norm& n, bool centred, const Window<V>& hat,
            const Window<V>& out, T* rstd, const StepRange& range) const {
    const Affine<T> affine(n, tile_.weights.packed);
    if (plan_.config.joint_norm) {
      const int64_t stride = Activations<V>::rstd_stride(tile_.rows);
      norm_elements<V>(y, residual, affine, hat, out, rstd ? rstd + range.at * stride : nullptr, stride, tile_.rows,
                       plan_.Q, range.count);
    } else {
      norm_rows<V>(y, residual, affine, centred, hat, out,
                   rstd ? rstd + range.at * live().count * live().height : nullptr, live(), range.count * live().count);
    }
  }

  Tile<V>& tile_;
  const Plan& plan_;
  const InputRows<V>& inputs_;
  const AttentionScratch<V>& scratch_;
};

}  // namespace RMC_ISA
}  // namespace rmc
