#define RMC_ISA amx
#include <immintrin.h>

#include "machine/loops.h"
#include "machine/tile_config.h"

namespace rmc {
namespace {

constexpr double kTileFlops = 2.0 * 16 * 16 * 32;  // 16 x 16 results, each over 32 bf16 products

}  // namespace

double tile_loop_amx(int64_t iterations) {
  const amx::TileConfig config;
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
  return 4 * kTileFlops * static_cast<double>(iterations);
}

}  // namespace rmc
