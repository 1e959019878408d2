// C = A W + bias on panels, W packed by gemm/pack.h.
//
// Every element of C is one chain of multiply-adds in the order of k per block of 64, and the blocks are added in
// order, whatever the panel height and the number of columns a kernel takes. So a row's result depends on that row
// alone: not on its neighbours, the tile, the threads, or how a sequence was cut. The bias is added last: a chain that
// starts from it rounds every partial sum at its size (a gate bias of -2: 2.7 times PyTorch's error in the memories).
#pragma once
#include <cstdint>
#include <utility>

#include "gemm/pack.h"
#include "gemm/panels.h"

namespace rmc {
namespace RMC_ISA {

enum class Start { kBias, kAccumulate };

// Short chains are for accuracy: PyTorch sums a single row in many lanes at once. At B = 1, D = 256 the RMS error of
// the memories was 2.0 times PyTorch's with blocks of 256, 1.6 with 128, 1.3 with 64; 64 costs at most 2 % of the time.
constexpr int64_t kBlockK = 64;
constexpr int64_t kPrefetchBytes = 1024;
// Of a left side that stays in the L1 cache whole: weights are then read in the order in which they lie.
constexpr int64_t kFewBytes = 16 << 10;

template <class V, int R, int C>
inline void gemm_kernel(int64_t k, const typename V::T* a, const typename V::T* w, int64_t pair_stride,
                        const typename V::T* bias, const typename V::T* mask, bool accumulate, bool relu,
                        typename V::T* c) {
  constexpr int W = V::W;
  constexpr int kPair = C == 1 ? 1 : 2;
  constexpr int kLine = 64 / sizeof(typename V::T);  // of the cache, in numbers
  V acc[R][C];
#pragma GCC unroll 4
  for (int j = 0; j < C; j++) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) acc[r][j] = V::zero();
  }
  for (int64_t chunk = 0; chunk < k; chunk += W) {
#pragma GCC unroll 4
    for (int u = 0; u < W; u++) {
      V weight[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; j++) {
        const int at = (u * kPair + j % 2) * W;
        const typename V::T* p = w + (j / 2) * pair_stride + at;
        weight[j] = V::load(p);
        if (at % kLine == 0) prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const V x = V::broadcast(a + r * W, u);
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) acc[r][j] = fma(x, weight[j], acc[r][j]);
      }
    }
    a += R * W;
    w += kPair * W * W;
  }
  if (mask) {
#pragma GCC unroll 4
    for (int j = 0; j < C; j++) {
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][j] = without_padding(acc[r][j], mask, j * W);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < C; j++) {
    const V last = bias ? V::load(bias + j * W) : V::zero();
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      typename V::T* to = c + (j * R + r) * W;
      V y = (accumulate ? V::load(to) + acc[r][j] : acc[r][j]) + last;
      if (relu) y = max(V::zero(), y);  // a NaN stays one
      y.store(to);
    }
  }
}

template <class V>
using GemmKernel = void (*)(int64_t, const typename V::T*, const typename V::T*, int64_t, const typename V::T*,
                            const typename V::T*, bool, bool, typename V::T*);

template <class V, int C, int... R>
inline GemmKernel<V> gemm_kernel_of(int height, std::integer_sequence<int, R...>) {
  static constexpr GemmKernel<V> table[] = {gemm_kernel<V, R + 1, C>...};
  return table[height - 1];
}

template <class V, int C>
inline GemmKernel<V> gemm_kernel_of(int height) {
  return gemm_kernel_of<V, C>(height, std::make_integer_sequence<int, V::kMaxRows>());
}

// The kernels of a panel height, by the vectors of columns that they take: four, two or one.
template <class V>
class GemmKernels {
 public:
  explicit GemmKernels(int height) : one_(gemm_kernel_of<V, 1>(height)), two_(gemm_kernel_of<V, 2>(height)) {
    if constexpr (V::kWideRows > 0) {
      if (height <= V::kWideRows) four_ = gemm_kernel_of<V, 4>(height, std::make_integer_sequence<int, V::kWideRows>());
    }
  }
  int64_t take(int64_t left) const { return left >= 4 && four_ ? 4 : left >= 2 ? 2 : 1; }
  GemmKernel<V> operator[](int64_t take) const { return take == 4 ? four_ : take == 2 ? two_ : one_; }

 private:
  GemmKernel<V> one_, two_, four_ = nullptr;
};

// One product: `count` panels from panel `first_a` of A and `first_c` of C.
template <class V>
struct Product {
  using T = typename V::T;
  const Panels<V>& a;
  int64_t first_a;
  const T* bias;  // null: none
  const Panels<V>& c;
  int64_t first_c, count;
  Start start = Start::kBias;
  bool relu = false;
  const T* mask = nullptr;  // of C's columns, see without_padding; Weights fill it in

  // A block of k for the columns of chunk j on; `w` are their packed weights.
  void block(const GemmKernels<V>& kernels, int64_t take, int64_t j, int64_t k0, const T* w) const {
    constexpr int W = V::W;
    const int64_t K = a.columns, k = K - k0 < kBlockK ? K - k0 : kBlockK;
    const bool accumulate = k0 > 0 || start == Start::kAccumulate;
    for (int64_t p = 0; p < count; p++) {
      kernels[take](k, a.panel(first_a + p) + k0 * a.height, w + k0 * (take == 1 ? 1 : 2) * W, 2 * W * K,
                    bias && k0 + k == K ? bias + j * W : nullptr, mask ? mask + j * W : nullptr, accumulate,
                    relu && k0 + k == K, c.panel(first_c + p) + j * c.height * W);
    }
  }
};

// Where products are of tiles; in gemm/tile_gemm.h.
template <class V>
void tile_gemm(const Product<V>& product, const float* packed);

// `weights` holds [A.columns, C.columns], packed.
template <class V>
void gemm(const Product<V>& product, const typename V::T* weights) {
  if constexpr (V::kTerms > 0) return tile_gemm(product, weights);
  const int64_t K = product.a.columns, chunks = product.c.columns / V::W;
  const GemmKernels<V> kernels(product.a.height);
  const bool few = product.count * product.a.height * K * static_cast<int64_t>(sizeof(typename V::T)) <= kFewBytes;
  const int64_t block = few ? K : kBlockK;
  for (int64_t first = 0; first < K; first += block) {
    for (int64_t j = 0, take; j < chunks; j += take) {
      take = kernels.take(chunks - j);
      for (int64_t k0 = first; k0 < first + block && k0 < K; k0 += kBlockK)
        product.block(kernels, take, j, k0, weights + j * V::W * K);
    }
  }
}

// The same, the same bits, with weights that are packed a few columns at a time, in `room` for 4 W columns: where they
// are used only once, writing all of them and reading them again takes longer than the product.
template <class V>
void gemm(const Product<V>& product, const Matrix<V>& weights, typename V::T* room) {
  const int64_t K = product.a.columns, chunks = product.c.columns / V::W;
  const GemmKernels<V> kernels(product.a.height);
  for (int64_t j = 0, take; j < chunks; j += take) {
    take = kernels.take(chunks - j);
    pack_columns<V>(weights, j * V::W, take * V::W, room);
    for (int64_t k0 = 0; k0 < K; k0 += kBlockK) product.block(kernels, take, j, k0, room);
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
