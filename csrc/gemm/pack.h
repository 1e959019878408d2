// Weights as gemm/gemm.h reads them: two vectors of columns side by side for all k ([K][2 W]), then the next two; an
// odd last vector alone ([K][W]). Those that AMX reads are made in gemm/tile_gemm.h.
#pragma once
#include <cstdint>

#include "gemm/axis.h"
#include "simd/vectors.h"

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

// The matrix whose element (k, column) is source[k_axis.index[k] * k_stride + column_axis.index[column] *
// column_stride], one of the strides being 1; padding is zero. `mean`, per true k, is subtracted.
template <class V>
struct Matrix {
  using T = typename V::T;
  static constexpr int W = V::W;
  const T* source;
  const Axis& k_axis;
  int64_t k_stride;
  const Axis& column_axis;
  int64_t column_stride;
  const T* mean;

  // W rows from k on, W columns each.
  void block(int64_t k, int64_t column, V* rows) const {
    const int32_t *ki = k_axis.index + k, *ci = column_axis.index + column;
    // Padding only ends a run, so a block whose last entries are true is consecutive.
    if (ki[W - 1] < 0 || ci[W - 1] < 0) return ragged_block(ki, ci, rows);
    const T* from = source + ki[0] * k_stride + ci[0] * column_stride;
    const int64_t stride = column_stride == 1 ? k_stride : column_stride;
    for (int i = 0; i < W; i++) rows[i] = V::load(from + i * stride);
    if (column_stride != 1) V::transpose(rows);
    for (int i = 0; mean && i < W; i++) rows[i] = rows[i] - V::set(mean[ki[i]]);
  }

 private:
  void ragged_block(const int32_t* ki, const int32_t* ci, V* rows) const {
    for (int i = 0; i < W; i++) {
      T row[W] = {};
      for (int j = 0; j < W && ki[i] >= 0; j++) {
        if (ci[j] >= 0) row[j] = source[ki[i] * k_stride + ci[j] * column_stride] - (mean ? mean[ki[i]] : T(0));
      }
      rows[i] = V::load(row);
    }
  }
};

// Some columns of a matrix, as a packed matrix of their own.
template <class V>
void pack_columns(const Matrix<V>& matrix, int64_t first, int64_t columns, typename V::T* packed) {
  constexpr int W = V::W;
  const int64_t K = matrix.k_axis.padded;
  for (int64_t c = 0; c < columns; c += W) {
    for (int64_t k = 0; k < K; k += W) {
      V rows[W];
      matrix.block(k, first + c, rows);
      int64_t step;
      typename V::T* to = packed_block<V>(packed, K, columns, k, c, &step);
      for (int i = 0; i < W; i++) rows[i].store(to + i * step);
    }
  }
}

// Where products are of tiles; in gemm/tile_gemm.h.
template <class V>
void tile_pack(const Matrix<V>& matrix, float* packed);

template <class V>
void pack(const Matrix<V>& matrix, typename V::T* packed) {
  if constexpr (V::kTerms > 0) return tile_pack(matrix, packed);
  pack_columns<V>(matrix, 0, matrix.column_axis.padded, packed);
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
