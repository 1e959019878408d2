// Fills the table of functions of an instruction set.
#pragma once
#include "cell/run.h"

namespace rmc {
namespace RMC_ISA {

template <class V>
constexpr Kernels table() {
  return {{V::W, V::kMaxRows, V::kTerms}, pack_weights<V>, forward<V>, backward<V>, activation_size<V>};
}

}  // namespace RMC_ISA
}  // namespace rmc
