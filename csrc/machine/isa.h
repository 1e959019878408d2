// The instruction sets that kernels are compiled for, from the plainest up. Each stands for one file suffix and its
// compiler flags (CMakeLists.txt), so what supported() asks of the CPU must cover what those flags let the compiler
// use.
#pragma once
#include <string>
#include <vector>

namespace rmc {

enum class Isa { kGeneric, kNeon, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* name(Isa isa);

// True where this build contains the instruction set and this process may execute it.
bool supported(Isa isa);

// All supported instruction sets, the plainest first.
std::vector<Isa> supported_isas();

// Throws std::invalid_argument for an unknown name or an instruction set that is not supported here.
Isa parse_isa(const std::string& text);

}  // namespace rmc
