// The loops behind the ceilings, one set per instruction set. Each returns what the rate is counted from.
#pragma once
#include <cstdint>

namespace rmc {

// Keeps the multiply-add units busy from registers alone; returns the floating point operations executed.
double fma_loop_generic(int64_t iterations);
double fma_loop_avx2(int64_t iterations);
double fma_loop_avx512(int64_t iterations);

// Reads `count` floats (a multiple of 256) from a 64-byte aligned buffer; returns their sum.
float read_loop_generic(const float* data, int64_t count);
float read_loop_avx2(const float* data, int64_t count);
float read_loop_avx512(const float* data, int64_t count);

// Multiplies bf16 tiles from registers alone; returns the floating point operations executed.
double tile_loop_amx(int64_t iterations);

}  // namespace rmc
