// M' = sigmoid(i) tanh(C) + sigmoid(f) M.
#pragma once
#include "cell/step.h"

namespace rmc {
namespace RMC_ISA {

template <class V>
inline void sigmoid_gates(const Plan& plan, const typename V::T* input, int64_t input_step, typename V::T* gates,
                          int64_t step, int64_t chunk, V* i, V* f) {
  const int64_t forget = plan.Gp / V::W;
  *i = sigmoid(V::load(gates + chunk * step) + V::load(input + chunk * input_step));
  *f = sigmoid(V::load(gates + (forget + chunk) * step) + V::load(input + (forget + chunk) * input_step));
}

// One slot: writes the new memory with its tanh (null: only what the backward pass needs) and keeps i, f and tanh(C) if
// asked to.
template <class V, bool kKeep>
inline void gate_row(const Plan& plan, const typename V::T* input, int64_t input_step, typename V::T* gates,
                     const typename V::T* candidate, typename V::T* tanh_out, const typename V::T* memory,
                     int32_t height, typename V::T* next, typename V::T* next_tanh) {
  using T = typename V::T;
  const int64_t step = int64_t{height} * V::W, chunks = plan.Dp / V::W, forget = plan.Gp / V::W;
  const T* mask = static_cast<const T*>(plan.memory_gate.in.mask);  // a gate of the whole row may be NaN
  V i = V::zero(), f = V::zero();
  if (plan.config.gate == Gate::kMemory) {
    sigmoid_gates<V>(plan, input, input_step, gates, step, 0, &i, &f);
    if (kKeep) i.store(gates), f.store(gates + forget * step);
    T first[V::W], second[V::W];
    i.store(first), f.store(second);
    i = V::set(first[0]), f = V::set(second[0]);
  }
  for (int64_t c = 0; c < chunks; c++) {
    if (plan.config.gate == Gate::kUnit) {
      sigmoid_gates<V>(plan, input, input_step, gates, step, c, &i, &f);
      if (kKeep) i.store(gates + c * step), f.store(gates + (forget + c) * step);
    }
    const V squashed = tanh(V::load(candidate + c * step));
    if (kKeep) squashed.store(tanh_out + c * step);
    if (next) {
      const V m = without_padding(fma(f, V::load(memory + c * step), i * squashed), mask, c * V::W);
      m.store(next + c * step);
      tanh(m).store(next_tanh + c * step);
    }
  }
}

// The rows of a panel with unit gates, chunk by chunk: what a row by row pass reads is 1 KB apart, which no prefetcher
// follows (B=16, D=256: 125 us a step row by row, 87 so). `input[r]` is the gates' input term of row r, `out[r]` where
// its D new numbers go.
template <class V>
inline void gate_panel(const Plan& plan, int64_t rows, const typename V::T* const* input, int64_t input_step,
                       const typename V::T* gates, const typename V::T* candidate, const typename V::T* memory,
                       int32_t height, typename V::T* next, typename V::T* next_tanh, typename V::T* const* out) {
  constexpr int64_t W = V::W;
  const int64_t step = int64_t{height} * W, chunks = plan.Dp / W, forget = plan.Gp / W;
  for (int64_t c = 0; c < chunks; c++) {
    const int64_t true_columns = plan.D - c * W;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = c * step + r * W;
      const V i = sigmoid(V::load(gates + at) + V::load(input[r] + c * input_step));
      const V f = sigmoid(V::load(gates + at + forget * step) + V::load(input[r] + (forget + c) * input_step));
      const V m = fma(f, V::load(memory + at), i * tanh(V::load(candidate + at)));
      m.store(next + at);
      tanh(m).store(next_tanh + at);
      if (true_columns >= W) {
        m.store(out[r] + c * W);
      } else {
        m.store_n(out[r] + c * W, true_columns);
      }
    }
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
