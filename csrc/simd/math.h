// exp, sigmoid and tanh of a vector. NaN gives NaN. float: polynomials, the errors over all arguments that
// tests/test_cpu_backend.py holds them to are exp 1.2e-7, sigmoid 2e-7, tanh 2.5e-7, relative; results below 2^-126 may
// be flushed. double (the generic build only): the C library.
#pragma once
#include <cmath>
#include <type_traits>

#include "simd/vectors.h"

namespace rmc {
namespace RMC_ISA {

// e^x = 2^n (1 + q): returns q = e^r - 1 for |r| <= ln2 / 2 (relative error 3e-9 before rounding).
template <class V>
inline V exp_parts(V x, V& n) {
  n = round(x * V::set(1.44269504f));
  V r = fnma(n, V::set(0.693359375f), x);  // ln2 in two parts: the first has so few bits that n times it is exact
  r = fnma(n, V::set(-2.12194440e-4f), r);
  V p = V::set(1.3950601849e-03f);
  p = fma(p, r, V::set(8.3689535557e-03f));
  p = fma(p, r, V::set(4.1666204145e-02f));
  p = fma(p, r, V::set(1.6666518306e-01f));
  p = fma(p, r, V::set(5.0000000957e-01f));
  return fma(p * r, r, r);
}

// Operand order: min and max return their second argument for a NaN.
template <class V>
inline V clamp(V x, typename V::T low, typename V::T high) {
  return max(V::set(low), min(V::set(high), x));
}

template <class V>
inline V exp(V x) {
  if constexpr (std::is_same_v<typename V::T, double>) {
    return V::map(x, [](double a) { return std::exp(a); });
  } else {
    V n;
    const V q = exp_parts(clamp(x, -104.f, 89.f), n);
    return scale2(q + V::set(1.f), n);
  }
}

template <class V>
inline V sigmoid(V x) {
  if constexpr (std::is_same_v<typename V::T, double>) {
    return V::map(x, [](double a) { return 1 / (1 + std::exp(-a)); });
  } else {  // exactly 0 below -87, exactly 1 from 17 on
    V n;
    const V q = exp_parts(clamp(V::zero() - x, -104.f, 87.f), n);
    const V e = scale2(q + V::set(1.f), n);
    return zero_if_less(x, V::set(-87.f), reciprocal(e + V::set(1.f)));
  }
}

template <class V>
inline V tanh(V x) {
  if constexpr (std::is_same_v<typename V::T, double>) {
    return V::map(x, [](double a) { return std::tanh(a); });
  } else {  // e / (e + 2) with e = exp(2 |x|) - 1, which keeps the relative error small near 0
    const V a = abs(x);
    V n;
    const V q = exp_parts(min(V::set(20.f), a + a), n);
    const V power = scale2(V::set(1.f), n);
    const V e = fma(power, q, power - V::set(1.f));
    return with_sign_of(e * reciprocal(e + V::set(2.f)), x);
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
