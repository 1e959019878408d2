// A tile of batch elements: who it is, and moving its rows in and out.
#pragma once
#include "cell/activations.h"
#include "cell/kernels.h"
#include "cell/norm.h"
#include "cell/weights.h"
#include "common/profile.h"
#include "simd/math.h"

namespace rmc {
namespace RMC_ISA {

// Copies `size` numbers into a row of panels, with zeros up to `padded`. A null source gives zeros.
template <class V>
inline void load_row(const typename V::T* source, int64_t size, int64_t padded, int32_t height, typename V::T* row) {
  constexpr int64_t W = V::W;
  int64_t c = 0;
  if (source) {
    for (; c + W <= size; c += W) V::load(source + c).store(row + c * height);
    if (c < size) V::load_n(source + c, size - c).store(row + c * height), c += W;
  }
  for (; c < padded; c += W) V::zero().store(row + c * height);
}

template <class V>
inline void store_row(const typename V::T* row, int64_t size, int32_t height, typename V::T* target) {
  constexpr int64_t W = V::W;
  int64_t c = 0;
  for (; c + W <= size; c += W) V::load(row + c * height).store(target + c);
  if (c < size) V::load(row + c * height).store_n(target + c, size - c);
}

template <class V>
inline void copy_row(const typename V::T* from, int32_t from_height, int64_t columns, typename V::T* to,
                     int32_t to_height) {
  for (int64_t c = 0; c < columns; c += V::W) V::load(from + c * from_height).store(to + c * to_height);
}

template <class V>
struct Tile {
  using T = typename V::T;
  const Plan& plan;
  const CellInputs& in;
  Weights<V> weights;
  int64_t first;  // batch element
  TileRows rows;
  int64_t end = 0;  // steps until the last element of the tile has ended
  PhaseClock clock;

  Tile(const CellInputs& i, const Weights<V>& w, int64_t b, int64_t count)
      : plan(w.plan), in(i), weights(w), first(b), rows(plan, count) {
    for (int64_t e = 0; e < count; e++) end = ends(e) > end ? ends(e) : end;
  }

  // Steps of element e, clamped.
  int64_t ends(int64_t e) const {
    if (!in.lengths) return in.steps;
    const int64_t length = in.lengths[first + e];
    return length < 0 ? 0 : length < in.steps ? length : in.steps;
  }
  bool runs(int64_t e, int64_t t) const { return t < ends(e); }
  bool resets(int64_t e, int64_t t) const { return in.resets && runs(e, t) && in.resets[(first + e) * in.steps + t]; }

  const T* initial_memory(int64_t e) const { return memory_of(in.memory, in.one_memory, e); }
  const T* reset_memory(int64_t e) const { return memory_of(in.reset_memory, in.one_reset_memory, e); }
  int64_t memory_offset(int64_t e, int64_t t) const { return ((first + e) * in.steps + t) * plan.N * plan.D; }
  const T* mask(int64_t e, int64_t t) const {
    if (!in.dropout_mask) return nullptr;
    return static_cast<const T*>(in.dropout_mask) + ((first + e) * in.steps + t) * plan.H * plan.N * plan.S;
  }

  // The slots of element e into the rows of step s (counted from panel 0 of `memory`), with their tanh.
  void load_memory(const T* source, int64_t e, const Activations<V>& a, int64_t s) const {
    const int32_t height = rows.slots.height;
    for (int64_t i = 0; i < plan.N; i++) {
      const int64_t r = e * plan.N + i, p = s * rows.slots.count;
      T* m = a.memory.row(p, r);
      load_row<V>(source ? source + i * plan.D : nullptr, plan.D, plan.Dp, height, m);
      if (plan.G) tanh_row(m, height, a.memory_tanh.row(p, r));
    }
  }

  void tanh_row(const T* m, int32_t height, T* out) const {
    for (int64_t c = 0; c < plan.Dp; c += V::W) tanh(V::load(m + c * height)).store(out + c * height);
  }

 private:
  const T* memory_of(const void* base, bool one, int64_t e) const {
    return static_cast<const T*>(base) + (one ? 0 : (first + e) * plan.N * plan.D);
  }
};

}  // namespace RMC_ISA
}  // namespace rmc
