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
      const V m = fma(f, V::load(memory + c * step), i * squashed);
      m.store(next + c * step);
      tanh(m).store(next_tanh + c * step);
    }
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
