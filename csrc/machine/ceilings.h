// The rates that no kernel of one thread can exceed on this machine, measured rather than looked up.
//
// Time is the CPU time of the calling thread, so that a descheduled thread is not counted, and each figure is the best
// of ten windows. Arguments out of range throw std::invalid_argument.
#pragma once
#include <cstdint>

#include "machine/isa.h"

namespace rmc {

// GFLOP/s of float32 multiply-adds from registers. The vectors of avx512bf16 and amx are those of avx512.
double peak_fma(double seconds, Isa isa);

// GFLOP/s of bf16 tile products from registers; 0 without AMX.
double peak_amx(double seconds);

// GB/s read, over and over, from a buffer of `bytes` (at least 4096; rounded down to a multiple of 1024).
double bandwidth(int64_t bytes, double seconds);

}  // namespace rmc
