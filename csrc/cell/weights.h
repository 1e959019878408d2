// All parameters of a cell as the kernels read them: matrices packed, vectors padded.
#pragma once
#include "cell/plan.h"
#include "gemm/gemm.h"
#include "gemm/pack.h"

namespace rmc {
namespace RMC_ISA {

template <class V>
struct Weights {
  using T = typename V::T;
  const Plan& plan;
  const T* packed;
  // Where matrices that are not reused are read instead, if not null, and room to pack 4 W columns of any of them.
  const void* const* params = nullptr;
  T* room = nullptr;

  void multiply(const Linear& l, Product<V> product) const {
    product.mask = static_cast<const T*>(l.out.mask);
    if (!params || l.reused) return gemm<V>(product, packed + l.packed);
    if constexpr (V::kTerms == 0)
      gemm<V>(product, Matrix<V>{static_cast<const T*>(params[l.weight]), l.in, 1, l.out, l.in.size, nullptr}, room);
  }
  // By the transpose.
  void multiply_back(const Linear& l, Product<V> product) const {
    product.mask = static_cast<const T*>(l.in.mask);
    gemm<V>(product, packed + l.packed_back);
  }
  const T* bias(const Linear& l) const { return packed + l.bias; }
};

template <class V>
struct Packer {
  using T = typename V::T;
  const Plan& plan;
  const void* const* params;
  T* packed;
  bool backward, only_reused;

  const T* param(int index) const { return static_cast<const T*>(params[index]); }

  void all() {
    if (plan.input.weight >= 0) linear(plan.input);
    for (int64_t b = 0; b < plan.unique_blocks; b++) {
      const Block& block = plan.block[b];
      linear(block.qkv);
      if (block.output.weight >= 0) linear(block.output);
      for (const Norm* norm : {&block.qkv_norm, &block.attention_norm, &block.mlp_norm}) affine(*norm);
    }
    for (int64_t l = 0; l < plan.unique_layers; l++) linear(plan.mlp[l]);
    if (plan.G) gates();
  }

 private:
  void linear(const Linear& l) {
    const T *weight = param(l.weight), *bias = param(l.bias_param), *mean = nullptr;
    pad_vector(bias, l.out, 1, packed + l.bias);
    if (l.centred) {
      mean = column_means(weight, l.out.size, l.in.size);
      T total = 0;
      for (int64_t i = 0; i < l.out.size; i++) total += bias[i];
      total /= static_cast<T>(l.out.size);
      for (int64_t i = 0; i < l.out.padded; i++) {
        if (l.out.index[i] >= 0) packed[l.bias + i] -= total;
      }
    }
    if (only_reused && !l.reused) return;
    pack<V>({weight, l.in, 1, l.out, l.in.size, mean}, packed + l.packed);
    // Not centred: the gradient behind a LayerNorm has mean 0, so the mean of the weights does not matter.
    if (backward) pack<V>({weight, l.out, l.in.size, l.in, 1, nullptr}, packed + l.packed_back);
  }

  const T* column_means(const T* weight, int64_t outputs, int64_t inputs) {
    constexpr int64_t W = V::W;
    T* means = packed + plan.means;
    const V scale = V::set(T(1) / static_cast<T>(outputs));
    for (int64_t i = 0; i < inputs; i += W) {
      const bool whole = i + W <= inputs;
      V even = V::zero(), odd = V::zero();
      for (int64_t o = 0; o < outputs; o++) {
        const T* p = weight + o * inputs + i;
        V& total = o % 2 ? odd : even;
        total = total + (whole ? V::load(p) : V::load_n(p, inputs - i));
      }
      ((even + odd) * scale).store(means + i);
    }
    return means;
  }

  void affine(const Norm& n) {
    if (n.weight < 0) return;
    pad_vector(param(n.weight), n.features, n.rows, packed + n.gamma);
    pad_vector(param(n.bias_param), n.features, n.rows, packed + n.beta);
  }

  // The input's term carries every bias of the gates, so that the memory's needs none.
  void gates() {
    linear(plan.input_gate);
    linear(plan.memory_gate);
    // In double, so that a large bias is rounded once.
    const double forget =
        plan.forget_bias_param >= 0 ? double{*param(plan.forget_bias_param)} : plan.config.forget_bias;
    const double input = plan.input_bias_param >= 0 ? double{*param(plan.input_bias_param)} : plan.config.input_bias;
    T* bias = packed + plan.input_gate.bias;
    const T* from_memory = packed + plan.memory_gate.bias;
    for (int64_t i = 0; i < plan.G; i++) {
      const int64_t f = plan.Gp + i;
      bias[i] = static_cast<T>(double{bias[i]} + double{from_memory[i]} + input);
      bias[f] = static_cast<T>(double{bias[f]} + double{from_memory[f]} + forget);
    }
  }
};

template <class V>
void pack_weights(const Plan& plan, const void* const* params, bool backward, void* packed) {
  Packer<V>{plan, params, static_cast<typename V::T*>(packed), backward, false}.all();
}

// The vectors, and the matrices that a step reuses.
template <class V>
void pack_reused(const Plan& plan, const void* const* params, void* packed) {
  Packer<V>{plan, params, static_cast<typename V::T*>(packed), false, true}.all();
}

}  // namespace RMC_ISA
}  // namespace rmc
