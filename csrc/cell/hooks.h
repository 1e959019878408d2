// What tests and developers call inside the float32 kernels of each instruction set; no call of a cell does.
#pragma once
#include <cstdint>

#include "machine/isa.h"

namespace rmc {

struct Hooks {
  void (*apply)(int function, const void* x, void* y, int64_t count);              // exp, sigmoid, tanh
  double (*gemm)(int64_t rows, int64_t inputs, int64_t outputs, int64_t repeats);  // least CPU seconds of one product
};

// Throws std::invalid_argument where this build does not have them.
const Hooks& hooks(Isa isa);

const Hooks& hooks_generic();
const Hooks& hooks_neon();
const Hooks& hooks_avx2();
const Hooks& hooks_avx512();
const Hooks& hooks_amx();

}  // namespace rmc
