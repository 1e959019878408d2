// What one cell needs to know before it runs: padded sizes, where each parameter goes, tile sizes. A pure function of
// the spec and the vector width, computed once per cell; B, T and the threads only choose how many tiles there are.
//
// Padding: every axis that a kernel walks in vectors of W is rounded up to W (names end in `p`), for queries, keys and
// values per head. What is padded is zero throughout, so it changes no sum. A zero times an infinity is not zero, so
// that what writes such a vector out of true columns clears its padding (without_padding in gemm/panels.h): products,
// norms and gates; the rest maps zeros to zeros.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "gemm/axis.h"
#include "machine/isa.h"

namespace rmc {

// What the products of a cell work with; everything else is float32, but for kFloat64, which is for tests.
enum class Precision { kFloat32, kBfloat16, kFloat64 };

enum class Gate { kNone, kMemory, kUnit };

// The flags of rmc_kernels.spec.CellSpec.
struct CellConfig {
  int64_t input_size = 0, slots = 0, head_size = 0, key_size = 0, heads = 0;
  int64_t rows = 1, blocks = 1, mlp_layers = 1;
  Gate gate = Gate::kNone;
  bool input_projection = false, qkv_norm = false, attention_norm = false, mlp_norm = false, joint_norm = false;
  bool output_projection = false, attention_residual = false, relu_last = false, tied = false;
  bool trains_gate_biases = false;
  double forget_bias = 0, input_bias = 0;
};

// A Linear: weight [out, in]. Offsets count elements, `packed`, `packed_back` and `bias` in the packed weights,
// `grad` and `grad_bias` in a gradient accumulator, where the weight is [out.padded, in.padded].
struct Linear {
  int weight = -1, bias_param = -1;  // positions in the list of parameters
  Axis out, in;
  bool reused = false;   // a step multiplies with it more than once
  bool centred = false;  // the mean over the outputs is subtracted: the LayerNorm behind it then has mean 0
  int64_t packed = 0, packed_back = 0, bias = 0, grad = 0, grad_bias = 0;
};

// The affine part of a LayerNorm: [rows, features.padded].
struct Norm {
  int weight = -1, bias_param = -1;
  int64_t rows = 1;
  Axis features;
  int64_t gamma = 0, beta = 0, grad_gamma = 0, grad_beta = 0;
};

struct Block {
  Linear qkv, output;
  Norm qkv_norm, attention_norm, mlp_norm;
};

struct Plan {
  CellConfig config;
  Isa isa = Isa::kGeneric;
  Precision precision = Precision::kFloat32;
  int64_t W = 0, max_rows = 0;

  int64_t N = 0, n = 0, S = 0, H = 0, K = 0, V = 0, D = 0, F = 0, G = 0, I = 0, L = 0, blocks = 0;
  int64_t Kp = 0, Vp = 0, Dp = 0, Fp = 0, Gp = 0, Ip = 0;
  int64_t head_stride = 0;  // 2 Kp + Vp: columns of one head in q | k | v
  int64_t Q = 0;            // rows per batch element that are live in a tile: N, or S where input rows count
  int64_t lanes = 0;        // (head, row) pairs of one element, padded: attention works on W of them at a time
  int64_t lane_stride = 0;  // from the lanes of one key to those of the next
  bool live_inputs = false;

  // Parameters. Tied cells have one block and one MLP layer that are used several times.
  Linear input, input_gate, memory_gate;
  const Block* block = nullptr;
  const Linear* mlp = nullptr;
  int64_t unique_blocks = 0, unique_layers = 0;
  int forget_bias_param = -1, input_bias_param = -1;
  int64_t params = 0;
  int64_t widest_input = 0;                      // the longest padded input axis of a Linear
  int64_t means = 0;                             // offset in the packed weights of room for the means of one Linear
  int64_t forward_weights = 0, all_weights = 0;  // elements of the packed weights, without and with the transposes
  int64_t gradient_size = 0;                     // elements of one gradient accumulator; those of norms come first:
  int64_t norm_gradient_size = 0;

  const Block& block_at(int64_t b) const { return block[config.tied ? 0 : b]; }
  const Linear& layer_at(int64_t l) const { return mlp[config.tied ? 0 : l]; }

  // The backward pass works on groups of this many batch elements and this many steps. Neither depends on B, T or the
  // threads, so that no sum does.
  int64_t group = 0, chunk = 0;

  std::shared_ptr<const void> storage;  // owns what the pointers above point to
};

// Throws std::invalid_argument where a size does not fit.
std::shared_ptr<const Plan> make_plan(const CellConfig& config, Isa isa, Precision precision);

// Height of a GEMM panel for so many rows: the fewest padded rows, tall panels first.
int panel_height(int64_t rows, int64_t max_rows);

}  // namespace rmc
