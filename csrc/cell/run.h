// The entry points of an instruction set: a batch over tiles, tiles over threads.
#pragma once
#include "cell/backward.h"
#include "cell/forward.h"
#include "common/parallel.h"

namespace rmc {
namespace RMC_ISA {

// Rows of a forward tile. At D=256 128 rows leave the L2 cache: 10 % slower on vectors, but the weights that AMX tiles
// stream are larger than that cache anyway.
template <class V>
constexpr int64_t kForwardRows = V::kTerms ? 128 : 64;

// What of the weights is packed for a call.
enum class Packing {
  kForward,
  kBoth,    // the transposes of the backward pass too
  kReused,  // what a step reuses, for one step of one tile: at B = 1 0.8 of the time that it takes with all packed
};

// The weights of a call: those that the caller packed before, or packed now.
template <class V>
class CallWeights {
 public:
  using T = typename V::T;

  CallWeights(const Plan& plan, const CellInputs& in, Packing packing)
      : memory_(CallScratch::kWeights, in.packed ? 0 : static_cast<size_t>(elements(plan, packing)) * sizeof(T)),
        weights_{plan, in.packed ? static_cast<const T*>(in.packed) : memory_.template as<T>()} {
    if (in.packed) return;
    T* packed = memory_.template as<T>();
    PhaseClock clock;
    if (packing == Packing::kReused) {
      pack_reused<V>(plan, in.params, packed);
      weights_.params = in.params, weights_.room = packed + reused(plan);
    } else {
      pack_weights<V>(plan, in.params, packing == Packing::kBoth, packed);
    }
    clock.end(Phase::kPack);
  }

  const Weights<V>& operator*() const { return weights_; }

 private:
  static int64_t reused(const Plan& plan) { return (plan.forward_weights + V::W - 1) / V::W * V::W; }
  static int64_t elements(const Plan& plan, Packing packing) {
    if (packing == Packing::kReused) return reused(plan) + plan.widest_input * 4 * V::W;
    return packing == Packing::kBoth ? plan.all_weights : plan.forward_weights;
  }

  CallScratch memory_;
  Weights<V> weights_;
};

// As even as possible over the threads. Free to choose: no result depends on it.
template <class V>
int64_t forward_tile(const Plan& plan, const CellInputs& in) {
  const int64_t most = kForwardRows<V> > plan.Q ? kForwardRows<V> / plan.Q : 1;
  const int64_t threads = in.threads > 1 ? in.threads : 1;
  const int64_t rounds = (in.batch + most * threads - 1) / (most * threads);
  return (in.batch + rounds * threads - 1) / (rounds * threads);
}

template <class V>
void forward(const Plan& plan, const CellInputs& in) {
  using T = typename V::T;
  if (in.batch == 0 || in.steps == 0) return;
  T* saved = static_cast<T*>(in.activations);
  const int64_t count = saved ? plan.group : forward_tile<V>(plan, in);
  const bool once = V::kTerms == 0 && !in.packed && in.steps == 1 && count >= in.batch;
  const CallWeights<V> weights(plan, in, once ? Packing::kReused : Packing::kForward);
  const int64_t step_size = saved ? Activations<V>::size(plan, TileRows(plan, count), true, 1) : 0;
  auto task = [&](int64_t i) {
    const int64_t b = i * count, left = in.batch - b;
    Tile<V> tile(in, *weights, b, left < count ? left : count);
    Forward<V>(tile, saved ? saved + i * in.steps * step_size : nullptr).run();
  };
  parallel_for((in.batch + count - 1) / count, in.threads, task);
}

// ---- Backward: gradients ----

// Groups of batch elements are gathered in slices; a slice adds up its groups in order, then the slices are added in
// order. Groups and slices depend on the spec, B and T only, so the sums are the same for any number of threads.

constexpr int64_t kSliceRows = 512;
constexpr int64_t kMostSlices = 64;
constexpr int64_t kSliceBytes = int64_t{256} << 20;  // for the accumulators of all slices

inline int64_t slice_count(const Plan& plan, const CellInputs& in, int64_t groups, int64_t scalar) {
  auto at_most = [](int64_t a, int64_t b) { return a < b ? a : b; };
  auto at_least = [](int64_t a, int64_t b) { return a > b ? a : b; };
  int64_t slices = at_most(groups, at_least(1, in.batch * in.steps * plan.Q / kSliceRows));
  slices = at_most(slices, at_least(4, kSliceBytes / (plan.gradient_size * scalar)));
  return at_most(slices, kMostSlices);
}

template <class V>
class GradientWriter {
 public:
  using T = typename V::T;
  GradientWriter(const Plan& plan, const CellGradients& out, const T* total) : plan_(plan), out_(out), total_(total) {}

  void all() const {
    if (plan_.input.weight >= 0) linear(plan_.input, plan_.input);
    for (int64_t b = 0; b < plan_.unique_blocks; b++) {
      const Block& block = plan_.block[b];
      linear(block.qkv, block.qkv);
      if (block.output.weight >= 0) linear(block.output, block.output);
      for (const Norm* n : {&block.qkv_norm, &block.attention_norm, &block.mlp_norm}) {
        if (n->weight < 0) continue;
        vectors(n->weight, n->features, n->rows, total_ + n->grad_gamma);
        vectors(n->bias_param, n->features, n->rows, total_ + n->grad_beta);
      }
    }
    for (int64_t l = 0; l < plan_.unique_layers; l++) linear(plan_.mlp[l], plan_.mlp[l]);
    if (!plan_.G) return;
    linear(plan_.input_gate, plan_.input_gate);
    linear(plan_.memory_gate, plan_.input_gate);
    scalar(plan_.input_bias_param, total_ + plan_.input_gate.grad_bias);
    scalar(plan_.forget_bias_param, total_ + plan_.input_gate.grad_bias + plan_.Gp);
  }

 private:
  T* target(int param) const { return param >= 0 ? static_cast<T*>(out_.params[param]) : nullptr; }

  void linear(const Linear& l, const Linear& bias_of) const {
    vectors(l.bias_param, l.out, 1, total_ + bias_of.grad_bias);
    T* to = target(l.weight);
    if (!to) return;
    for (int64_t o = 0; o < l.out.padded; o++) {
      if (l.out.index[o] < 0) continue;
      strip(l.in, total_ + l.grad + o * l.in.padded, to + l.out.index[o] * l.in.size);
    }
  }
  void vectors(int param, const Axis& axis, int64_t rows, const T* from) const {
    T* to = target(param);
    for (int64_t r = 0; to && r < rows; r++) strip(axis, from + r * axis.padded, to + r * axis.size);
  }
  static void strip(const Axis& axis, const T* from, T* to) {
    if (axis.padded == axis.size) {
      __builtin_memcpy(to, from, static_cast<size_t>(axis.size) * sizeof(T));
    } else {
      for (int64_t i = 0; i < axis.padded; i++) {
        if (axis.index[i] >= 0) to[axis.index[i]] = from[i];
      }
    }
  }
  void scalar(int param, const T* gate) const {
    T* to = target(param);
    if (!to) return;
    double total = 0;
    for (int64_t i = 0; i < plan_.G; i++) total += static_cast<double>(gate[i]);
    *to = static_cast<T>(total);
  }

  const Plan& plan_;
  const CellGradients& out_;
  const T* total_;
};

template <class V>
void add_slices(int64_t size, const typename V::T* slices, int64_t count, int threads, typename V::T* total) {
  constexpr int64_t kPiece = 1 << 14;
  auto add = [&](int64_t piece) {
    const int64_t end = (piece + 1) * kPiece < size ? (piece + 1) * kPiece : size;
    for (int64_t i = piece * kPiece; i < end; i += V::W) {
      V sum = V::load(total + i);
      for (int64_t s = 0; s < count; s++) sum = sum + V::load(slices + s * size + i);
      sum.store(total + i);
    }
  };
  parallel_for((size + kPiece - 1) / kPiece, threads, add);
}

template <class T>
void clear(void* data, int64_t count) {
  if (data && count > 0) __builtin_memset(data, 0, static_cast<size_t>(count) * sizeof(T));
}

template <class V>
void backward(const Plan& plan, const CellInputs& in, const CellGradients& out) {
  using T = typename V::T;
  if (in.lengths) clear<T>(out.x, in.batch * in.steps * plan.n * plan.I);
  clear<T>(out.reset_memory, in.batch * plan.N * plan.D);
  const CallWeights<V> weights(plan, in, Packing::kBoth);
  const int64_t groups = (in.batch + plan.group - 1) / plan.group;
  const int64_t slices = slice_count(plan, in, groups, sizeof(T)), size = plan.gradient_size;
  T* saved = static_cast<T*>(in.activations);
  const int64_t step_size = Activations<V>::size(plan, TileRows(plan, plan.group), true, 1);

  // One slice is summed in place; one thread needs a single accumulator besides the total.
  const bool together = slices <= 1, in_turn = in.threads <= 1;
  const int64_t accumulators = 1 + (together ? 0 : in_turn ? 1 : slices), norms = plan.norm_gradient_size;
  const int64_t elements = accumulators * size + (slices > 0 ? slices : 1) * norms;
  const CallScratch memory(CallScratch::kGradients, static_cast<size_t>(elements) * sizeof(T));
  T* total = memory.as<T>();
  T *each = total + (together ? 0 : size), *sums = total + accumulators * size;
  clear<T>(total, accumulators * size);

  auto task = [&](int64_t slice) {
    T* to = each + (together || in_turn ? 0 : slice * size);
    if (!together && in_turn && slice > 0) clear<T>(to, size);
    for (int64_t i = slice * groups / slices; i < (slice + 1) * groups / slices; i++) {
      const int64_t b = i * plan.group, left = in.batch - b;
      Tile<V> tile(in, *weights, b, left < plan.group ? left : plan.group);
      Backward<V>(tile, out, sums + slice * norms, to).run(saved ? saved + i * in.steps * step_size : nullptr);
    }
    if (!together && in_turn) add_slices<V>(size, to, 1, 1, total);
  };
  if (groups > 0) parallel_for(slices, in.threads, task);
  PhaseClock clock;
  if (!together && !in_turn) add_slices<V>(size, each, slices, in.threads, total);
  if (out.params) GradientWriter<V>(plan, out, total).all();
  clock.end(Phase::kReduce);
}

}  // namespace RMC_ISA
}  // namespace rmc
