// exp, sigmoid and tanh of a vector. NaN gives NaN; tanh is odd, -0 included. double (the generic build only): the C
// library. float: the largest errors in units in the last place of the exact result, and the largest root mean square
// over the arguments between two powers of 2, as swept over all 2^32 arguments in all instruction sets; torch's beside:
//
//            largest       RMS
//   exp      0.83 (0.56)   0.30 (0.29)
//   tanh     0.97 (0.52)   0.32 (0.30)
//   sigmoid  2.5  (2.4)    0.91 (0.91)   results below 2^-126 are 0
//
// Nearest to 0, where exp is 1 or a step beside it, even the exact result rounded has an RMS error of 0.38.
// tests/test_cpu_backend.py holds exp and tanh to 1.0 and 0.35.
#pragma once
#include <cmath>
#include <type_traits>

#include "simd/vectors.h"

namespace rmc {
namespace RMC_ISA {

// e^x = 2^n e^r and e^r = 1 + r + p r^2, for |r| <= ln2 / 2.
template <class V>
struct Exponential {
  V n, r, p;
};

template <class V>
inline Exponential<V> exponential(V x) {
  const V n = round(x * V::set(1.44269504f));
  V r = fnma(n, V::set(0.693359375f), x);  // ln2 in two parts: the first has so few bits that n times it is exact
  r = fnma(n, V::set(-2.12194440e-4f), r);
  V p = V::set(1.3950601849e-03f);
  p = fma(p, r, V::set(8.3689535557e-03f));
  p = fma(p, r, V::set(4.1666204145e-02f));
  p = fma(p, r, V::set(1.6666518306e-01f));
  p = fma(p, r, V::set(5.0000000957e-01f));
  return {n, r, p};
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
    const auto [n, r, p] = exponential(clamp(x, -104.f, 89.f));
    // p r^2 joins what the sum 1 + r lost by rounding; without that, errors reach 1.04.
    const V sum = V::set(1.f) + r, lost = r - (sum - V::set(1.f));
    return scale2(sum + fma(p, r * r, lost), n);
  }
}

template <class V>
inline V sigmoid(V x) {
  if constexpr (std::is_same_v<typename V::T, double>) {
    return V::map(x, [](double a) { return 1 / (1 + std::exp(-a)); });
  } else {  // exactly 0 below -87, exactly 1 from 17 on
    const auto [n, r, p] = exponential(clamp(V::zero() - x, -104.f, 87.f));
    const V e = scale2(fma(p * r, r, r) + V::set(1.f), n);
    return zero_if_less(x, V::set(-87.f), reciprocal(e + V::set(1.f)));
  }
}

template <class V>
inline V tanh(V x) {
  if constexpr (std::is_same_v<typename V::T, double>) {
    return V::map(x, [](double a) { return std::tanh(a); });
  } else {
    const V one = V::set(1.f), a = abs(x);
    // Near 0: a - a^3 / 4 + a^3 t(a^2). t is small, and so are its errors, even where a multiply-add rounds twice.
    const V square = a * a, cube = a * square;
    V t = V::set(-3.83331499e-4f);
    t = fma(t, square, V::set(2.38038623e-3f));
    t = fma(t, square, V::set(-8.04392807e-3f));
    t = fma(t, square, V::set(2.15459932e-2f));
    t = fma(t, square, V::set(-5.38979135e-2f));
    t = fma(t, square, V::set(1.33325979e-1f));
    t = fma(t, square, V::set(-8.3333075e-2f));
    const V near = a + fnma(cube, V::set(0.25f), cube * t);
    // Farther out: 1 - 2 / (e^2a + 1). Past 0.973 the fraction is below 1/4, and its own rounding at most 1/8 ulp.
    const auto [n, r, p] = exponential(min(V::set(20.f), a + a));
    const V power = scale2(one, n);
    const V half = reciprocal(fma(power, fma(p * r, r, r), power + one));
    const V far = one - (half + half);
    return with_sign_of(if_less(a, V::set(0.975f), near, far), x);
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
