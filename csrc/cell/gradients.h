// Gradients of a chunk of steps, in the layout of its activations, and the accumulators that they end up in.
#pragma once
#include "cell/step.h"
#include "gemm/weight_gradient.h"

namespace rmc {
namespace RMC_ISA {

// Gradients of what the Linears of a block put out: the left operands of the weight gradients.
template <class V>
struct BlockGradients {
  Panels<V> qkv, output, layers;  // layers: of layer 0; layer l is l * layer_stride further
  int64_t layer_stride = 0;
  Panels<V> layer(int64_t l) const {
    Panels<V> p = layers;
    p.data += l * layer_stride;
    return p;
  }
};

template <class V>
struct ChunkGradients {
  using T = typename V::T;
  Panels<V> gates;                                    // of the slots
  Panels<V> input_qkv, input_gates;                   // of the input rows of the chunk
  Panels<V> input_u, input_x, input_flat;             // of the projected input, the input, and u as one row per step
  Panels<V> dout, hidden, carry, from_gates, memory;  // of one step; `memory` is set by its owner
  BlockGradients<V> first;
  int64_t block_stride = 0;

  BlockGradients<V> block(int64_t b) const {
    BlockGradients<V> g = first;
    for (Panels<V>* p : {&g.qkv, &g.output, &g.layers}) {
      if (p->data) p->data += b * block_stride;
    }
    return g;
  }

  void bind(Bump& bump, const Plan& plan, const TileRows& rows, int64_t steps, const InputRows<V>& inputs) {
    auto panels = [&](const Rows& r, int64_t count, int64_t columns) { return Panels<V>(bump, r, columns, count); };
    for (int64_t b = 0; b < plan.blocks; b++) {
      const size_t start = bump.used();
      BlockGradients<V> g;
      g.qkv = panels(rows.live, steps, plan.Fp);
      if (plan.config.output_projection) g.output = panels(rows.live, steps, plan.Dp);
      const size_t before = bump.used();
      g.layers = panels(rows.live, steps, plan.Dp);
      g.layer_stride = static_cast<int64_t>((bump.used() - before) / sizeof(T));
      for (int64_t l = 1; l < plan.L; l++) panels(rows.live, steps, plan.Dp);
      if (b == 0) first = g;
      block_stride = static_cast<int64_t>((bump.used() - start) / sizeof(T));
    }
    if (plan.G) {
      gates = panels(rows.slots, steps, 2 * plan.Gp);
      input_gates = panels(inputs.pairs, 1, 2 * plan.Gp);
      if (plan.n > 1) input_flat = panels(inputs.pairs, 1, plan.n * plan.Dp);
    }
    if (!plan.live_inputs) input_qkv = panels(inputs.rows, 1, plan.Fp);
    input_u = panels(inputs.rows, 1, plan.Dp);
    input_x = plan.config.input_projection ? panels(inputs.rows, 1, plan.Ip) : input_u;
    dout = panels(rows.live, 1, plan.Dp);
    hidden = panels(rows.live, 1, plan.Dp);
    carry = panels(rows.slots, 1, plan.Dp);
    from_gates = panels(rows.slots, 1, plan.Dp);
  }
};

}  // namespace RMC_ISA
}  // namespace rmc
