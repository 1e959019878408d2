// The shapes of the AMX tile registers, held while an object of this type lives. For files compiled for AMX only, in
// their namespace.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace rmc {
namespace RMC_ISA {

class TileConfig {
 public:
  // Every tile has rows of 64 bytes: 16 of them, but results (0 to 3) and left operands (4, 5) only `rows`.
  explicit TileConfig(int rows = 16) {
    for (int tile = 0; tile < 8; tile++) {
      data_.row_bytes[tile] = 64;
      data_.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : 16);
    }
    // The intrinsic tells gcc of the first word only; without this the other stores are dropped as dead.
    asm volatile("" : : "r"(&data_) : "memory");
    _tile_loadconfig(&data_);
  }
  ~TileConfig() { _tile_release(); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;

 private:
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } data_;
};

}  // namespace RMC_ISA
}  // namespace rmc
