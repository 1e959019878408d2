// Products of operand tiles on the tile registers of AMX.
#pragma once
#include "gemm/tiles.h"
#include "machine/tile_config.h"

namespace rmc {
namespace RMC_ISA {

// Configured for left operands of `rows` rows while it lives.
class TileProduct {
 public:
  explicit TileProduct(int rows) : config_(rows) {}

  // sums[2 r + c] (16 rows of 16) = product of left operand r and right operand c over `depth` tiles of k; the second
  // operands are `a_next` and `b_next` words after the first.
  template <int Terms, int R, int C>
  void multiply(int64_t depth, const uint32_t* a, int64_t a_next, const uint32_t* b, int64_t b_next, Lines ahead,
                float* sums) const {
    constexpr int64_t kStep = Terms * kTileWords;
    asm volatile("" : : : "memory");  // tile loads do not tell gcc that they read memory
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
    for (int64_t k = 0; k < depth; k++, a += kStep, b += kStep) {
      ahead.prefetch(b, b_next);
      if constexpr (Terms == 1) {
        load_left<R>(a, a_next), load_right<C>(b, b_next), add_products<R, C>();
      } else {
        // Neighbours share an operand, so that six products take seven loads a side and not twelve.
        static_assert(Terms == 3);
        load_left<R>(a, a_next), load_right<C>(b + 2 * kTileWords, b_next), add_products<R, C>();
        load_right<C>(b + kTileWords, b_next), add_products<R, C>();
        load_left<R>(a + kTileWords, a_next), add_products<R, C>();
        load_right<C>(b, b_next), add_products<R, C>();
        load_left<R>(a + 2 * kTileWords, a_next), add_products<R, C>();
        load_left<R>(a, a_next), add_products<R, C>();
      }
    }
    _tile_stored(0, sums, 64);
    if constexpr (C > 1) _tile_stored(1, sums + 256, 64);
    if constexpr (R > 1) _tile_stored(2, sums + 512, 64);
    if constexpr (R > 1 && C > 1) _tile_stored(3, sums + 768, 64);
  }

 private:
  // Results are in tiles 0 to 3, left operands in 4 and 5, right operands in 6 and 7.
  template <int R>
  static void load_left(const uint32_t* a, int64_t next) {
    _tile_loadd(4, a, 64);
    if constexpr (R > 1) _tile_loadd(5, a + next, 64);
  }
  template <int C>
  static void load_right(const uint32_t* b, int64_t next) {
    _tile_loadd(6, b, 64);
    if constexpr (C > 1) _tile_loadd(7, b + next, 64);
  }
  template <int R, int C>
  static void add_products() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
  }

  TileConfig config_;
};

}  // namespace RMC_ISA
}  // namespace rmc
