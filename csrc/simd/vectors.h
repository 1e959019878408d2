// The vectors of the instruction set that a file is compiled for: a file of csrc/isa/ names their header as RMC_SIMD.
#pragma once
#include RMC_SIMD
