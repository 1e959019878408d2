// What each instruction set provides: one table of functions per translation unit in csrc/isa/.
#pragma once
#include <cstddef>
#include <cstdint>

#include "machine/isa.h"

namespace rmc {

struct Plan;
enum class Precision;

// Pointers are to the plan's scalar type (float or double), contiguous unless said otherwise; absent ones are null.
struct CellInputs {
  int64_t batch = 0, steps = 0;
  int threads = 1;
  const void* x = nullptr;       // [B, T, n, I]
  const void* memory = nullptr;  // [B, N, D]; [N, D] for all elements if `one_memory`
  const void* const* params = nullptr;
  const int64_t* lengths = nullptr;    // [B]
  const bool* resets = nullptr;        // [B, T]
  const void* reset_memory = nullptr;  // as `memory`
  bool one_memory = false, one_reset_memory = false;
  const void* dropout_mask = nullptr;  // [B, T, H, N, S]
  const void* packed = nullptr;        // packed weights to use instead of packing `params`
  void* memories = nullptr;            // [B, T, N, D]; written by forward, read by backward
  void* final_memory = nullptr;        // null, or [B, N, D]: forward's last step once more
  void* activations = nullptr;         // null, or what forward saves and backward reads
};

struct CellGradients {
  const void* memories = nullptr;  // [B, T, N, D]
  // Written where not null:
  void* x = nullptr;
  void* memory = nullptr;
  void* reset_memory = nullptr;
  void* const* params = nullptr;  // one pointer per parameter, each may be null
};

// Elements (not bytes) that saved activations take: steps * (batch * per_element + tiles * per_tile).
struct ActivationSize {
  int64_t per_element = 0, per_tile = 0;
};

struct Shape {
  int width, max_rows;
  int terms;  // bf16 numbers per operand of a product; 0: products take operands as they are
};

struct Kernels {
  Shape shape;
  void (*pack)(const Plan&, const void* const* params, bool backward, void* packed);
  void (*forward)(const Plan&, const CellInputs&);
  void (*backward)(const Plan&, const CellInputs&, const CellGradients&);
  ActivationSize (*activation_size)(const Plan&);
};

// Throws std::invalid_argument where this build does not have them.
const Kernels& kernels(Isa isa, Precision precision);

const Kernels& kernels_generic();
const Kernels& kernels_generic_double();
const Kernels& kernels_neon();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();  // bfloat16
const Kernels& kernels_amx();         // float32 through three bf16 terms
const Kernels& kernels_amx_bfloat16();

}  // namespace rmc
