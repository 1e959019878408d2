#include <immintrin.h>

#include "machine/loops.h"

namespace rmc {
namespace {

constexpr int kRows = 16, kRowBytes = 64;                          // of every tile: the largest there is
constexpr double kTileFlops = 2.0 * kRows * 16 * (kRowBytes / 2);  // 16 x 16 results, each over 32 bf16 products

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace

double tile_loop_amx(int64_t iterations) {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) {
    config.row_bytes[tile] = kRowBytes;
    config.rows[tile] = kRows;
  }
  // The intrinsic tells gcc of the first word only; without this the other stores are dropped as dead.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t n = 0; n < iterations; n++) {
    // Four independent accumulators, as a 2 x 2 block of a product has.
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4 * kTileFlops * static_cast<double>(iterations);
}

}  // namespace rmc
