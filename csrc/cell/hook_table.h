// Fills the table of hooks of an instruction set.
#pragma once
#include <algorithm>
#include <ctime>

#include "cell/hooks.h"
#include "cell/plan.h"
#include "common/scratch.h"
#include "gemm/gemm.h"
#include "simd/math.h"

namespace rmc {
namespace RMC_ISA {

template <class V>
void apply(int function, const void* x, void* y, int64_t count) {
  using T = typename V::T;
  for (int64_t i = 0; i < count; i += V::W) {
    const int64_t n = count - i < V::W ? count - i : V::W;
    const V v = V::load_n(static_cast<const T*>(x) + i, n);
    (function == 0 ? exp(v) : function == 1 ? sigmoid(v) : tanh(v)).store_n(static_cast<T*>(y) + i, n);
  }
}

inline double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// The GEMM of the cell alone, with its operands as the cell has them.
template <class V>
double time_gemm(int64_t rows, int64_t inputs, int64_t outputs, int64_t repeats) {
  using T = typename V::T;
  const int32_t height = panel_height(rows, V::kMaxRows);
  const Rows shape = {rows, (rows + height - 1) / height, height};
  const int64_t K = (inputs + V::W - 1) / V::W * V::W, N = (outputs + V::W - 1) / V::W * V::W;
  const int64_t weights = packed_size(V::kTerms, K, N);
  auto bind = [&](Bump& bump, Panels<V>& a, Panels<V>& c) {
    a = {bump, shape, K};
    c = {bump, shape, N};
    return bump.take<T>(weights);
  };
  Panels<V> a, c;
  const TaskScratch memory(TaskScratch::kTile, measured([&](Bump& bump) { bind(bump, a, c); }));
  Bump bump(memory);
  T* w = bind(bump, a, c);
  std::fill_n(a.data, shape.count * a.stride(), T(0));
  std::fill_n(w, weights, T(0));
  double best = 1e30;
  for (int64_t i = 0; i < repeats; i++) {
    const double start = thread_seconds();
    for (int j = 0; j < 4; j++) gemm<V>({a, 0, nullptr, c, 0, shape.count}, w);
    const double time = (thread_seconds() - start) / 4;
    if (time < best) best = time;
  }
  return best;
}

template <class V>
constexpr Hooks hook_table() {
  return {apply<V>, time_gemm<V>};
}

}  // namespace RMC_ISA
}  // namespace rmc
