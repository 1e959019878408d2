// Products of operand tiles on vectors, by the bf16 instruction of AVX-512: the interface of gemm/amx_product.h.
#pragma once
#include <utility>

#include "gemm/tiles.h"

namespace rmc {
namespace RMC_ISA {

class TileProduct {
 public:
  explicit TileProduct(int rows) : rows_(rows) {}

  template <int Terms, int R, int C>
  void multiply(int64_t depth, const uint32_t* a, int64_t a_next, const uint32_t* b, int64_t b_next, Lines ahead,
                float* sums) const {
    static_assert(Terms == 1);
    for (int i = 0; i < R; i++, a += a_next, sums += 2 * 256) {
      for (int row = 0; row < rows_; row += kRows) {
        const Kernel kernel = kernel_of<C>(rows_ - row, std::make_integer_sequence<int, kRows>());
        kernel(depth, a + row * 16, b, b_next, i + row == 0 ? ahead : Lines{}, sums + row * 16);
      }
    }
  }

 private:
  using Kernel = void (*)(int64_t, const uint32_t*, const uint32_t*, int64_t, Lines, float*);
  // 8 x 2 accumulators hide the latency of the instruction, and 10 loads are fewer than its 16 uses.
  static constexpr int kRows = 8;

  // One chain of sums per result, in the order of k.
  template <int H, int C>
  static void add_products(int64_t depth, const uint32_t* a, const uint32_t* b, int64_t b_next, Lines ahead,
                           float* sums) {
    __m512 total[H][C];
#pragma GCC unroll 8
    for (int r = 0; r < H; r++) {
#pragma GCC unroll 2
      for (int c = 0; c < C; c++) total[r][c] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < depth; k++, a += kTileWords, b += kTileWords) {
      ahead.prefetch(b, b_next);
#pragma GCC unroll 4
      for (int word = 0; word < 16; word++) {
        __m512i right[C];
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) right[c] = _mm512_load_si512(b + c * b_next + word * 16);
#pragma GCC unroll 8
        for (int r = 0; r < H; r++) {
          const __m512i left = _mm512_set1_epi32(static_cast<int>(a[r * 16 + word]));
#pragma GCC unroll 2
          for (int c = 0; c < C; c++) total[r][c] = _mm512_dpbf16_ps(total[r][c], (__m512bh)left, (__m512bh)right[c]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < H; r++) {
#pragma GCC unroll 2
      for (int c = 0; c < C; c++) _mm512_store_ps(sums + c * 256 + r * 16, total[r][c]);
    }
  }

  template <int C, int... H>
  static Kernel kernel_of(int rows, std::integer_sequence<int, H...>) {
    static constexpr Kernel table[] = {add_products<H + 1, C>...};
    return table[(rows < kRows ? rows : kRows) - 1];
  }

  int rows_;
};

}  // namespace RMC_ISA
}  // namespace rmc
