// Weights as gemm/gemm.h reads them: two vectors of columns side by side for all k ([K][2 W]), then the next two; an
// odd last vector alone ([K][W]).
#pragma once
#include <cstdint>

#include "cell/plan.h"

namespace rmc {
namespace RMC_ISA {

template <class V>
inline typename V::T* packed_block(typename V::T* packed, int64_t K, int64_t columns, int64_t k, int64_t column,
                                   int64_t* step) {
  constexpr int64_t W = V::W;
  const int64_t pair = column / (2 * W), odd = column / W % 2;
  const bool whole = (pair + 1) * 2 * W <= columns;
  *step = whole ? 2 * W : W;
  return packed + pair * 2 * W * K + k * *step + odd * W;
}

// Packs the matrix whose element (k, column) is source[k_axis.index[k] * k_stride + column_axis.index[column] *
// column_stride], one of the strides being 1; padding becomes zero. `mean`, per true k, is subtracted.
template <class V>
void pack(const typename V::T* source, const Axis& k_axis, int64_t k_stride, const Axis& column_axis,
          int64_t column_stride, const typename V::T* mean, typename V::T* packed) {
  using T = typename V::T;
  constexpr int W = V::W;
  const int64_t K = k_axis.padded, columns = column_axis.padded;
  for (int64_t c = 0; c < columns; c += W) {
    for (int64_t k = 0; k < K; k += W) {
      const int32_t *ki = k_axis.index + k, *ci = column_axis.index + c;
      int64_t step;
      T* to = packed_block<V>(packed, K, columns, k, c, &step);
      // Padding only ends a run, so a block whose last entries are true is consecutive.
      if (ki[W - 1] >= 0 && ci[W - 1] >= 0) {
        V rows[W];
        const T* from = source + ki[0] * k_stride + ci[0] * column_stride;
        if (column_stride == 1) {
          for (int i = 0; i < W; i++) rows[i] = V::load(from + i * k_stride);
        } else {
          for (int i = 0; i < W; i++) rows[i] = V::load(from + i * column_stride);
          V::transpose(rows);
        }
        for (int i = 0; i < W; i++) {
          if (mean) rows[i] = rows[i] - V::set(mean[ki[i]]);
          rows[i].store(to + i * step);
        }
      } else {
        for (int i = 0; i < W; i++) {
          for (int j = 0; j < W; j++) {
            const bool pad = ki[i] < 0 || ci[j] < 0;
            to[i * step + j] =
                pad ? T(0) : source[ki[i] * k_stride + ci[j] * column_stride] - (mean ? mean[ki[i]] : T(0));
          }
        }
      }
    }
  }
}

// A vector with its padding, `rows` of them.
template <class T>
void pad_vector(const T* source, const Axis& axis, int64_t rows, T* out) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < axis.padded; i++) {
      out[r * axis.padded + i] = axis.index[i] < 0 ? T(0) : source[r * axis.size + axis.index[i]];
    }
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
