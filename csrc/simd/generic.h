// Sixteen bytes of floats or doubles in the compiler's own vectors: right on any machine. simd/avx512.h says what each
// operation is. A multiply-add rounds twice here (-ffp-contract=off), in every kernel alike.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace rmc {
namespace RMC_ISA {

template <class Scalar>
struct Vector {
  using T = Scalar;
  typedef T Lanes __attribute__((vector_size(16)));
  static constexpr int W = 16 / sizeof(T);
  static constexpr int kTerms = 0;
  static constexpr int kMaxRows = 4;
  static constexpr int kWideRows = 0;
  static constexpr int kGradRows = 2;
  using Bits = decltype(Lanes() < Lanes());  // integers
  Lanes v;

  static Vector load(const T* p) {
    Vector x;
    std::memcpy(&x.v, p, sizeof x.v);
    return x;
  }
  static Vector load_n(const T* p, int64_t n) {
    Vector x = zero();
    for (int64_t i = 0; i < n; i++) x.v[i] = p[i];
    return x;
  }
  static Vector set(T x) {
    Vector r;
    for (int i = 0; i < W; i++) r.v[i] = x;
    return r;
  }
  static Vector broadcast(const T* p, int lane) { return set(p[lane]); }
  static Vector zero() { return set(0); }
  void store(T* p) const { std::memcpy(p, &v, sizeof v); }
  void store_n(T* p, int64_t n) const {
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
  }

  template <class Function>
  static Vector map(Vector a, Function f) {
    for (int i = 0; i < W; i++) a.v[i] = f(a.v[i]);
    return a;
  }

  friend Vector operator+(Vector a, Vector b) { return {a.v + b.v}; }
  friend Vector operator-(Vector a, Vector b) { return {a.v - b.v}; }
  friend Vector operator*(Vector a, Vector b) { return {a.v * b.v}; }
  friend Vector operator/(Vector a, Vector b) { return {a.v / b.v}; }
  friend Vector operator&(Vector a, Vector b) { return {(Lanes)((Bits)a.v & (Bits)b.v)}; }
  friend Vector fma(Vector a, Vector b, Vector c) { return {a.v * b.v + c.v}; }
  friend Vector fnma(Vector a, Vector b, Vector c) { return {c.v - a.v * b.v}; }
  friend Vector max(Vector a, Vector b) { return {a.v > b.v ? a.v : b.v}; }
  friend Vector min(Vector a, Vector b) { return {a.v < b.v ? a.v : b.v}; }
  friend Vector abs(Vector a) {
    return map(a, [](T x) { return x < 0 || (x == 0 && __builtin_signbit(x)) ? -x : x; });
  }
  friend Vector with_sign_of(Vector a, Vector sign) {
    for (int i = 0; i < W; i++) a.v[i] = __builtin_signbit(sign.v[i]) ? -a.v[i] : a.v[i];
    return a;
  }
  friend Vector round(Vector a) {  // |a| < 2^22
    const Vector big = set(static_cast<T>(12582912));
    return (a + big) - big;
  }
  friend Vector scale2(Vector a, Vector n) {
    for (int i = 0; i < W; i++) {
      // A NaN has no integer to convert to; it is in `a` as well.
      const int32_t whole = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0, half = whole >> 1;
      a.v[i] = a.v[i] * power2(half) * power2(whole - half);
    }
    return a;
  }
  friend Vector reciprocal(Vector a) { return set(1) / a; }
  friend Vector if_less(Vector a, Vector bound, Vector x, Vector y) { return {a.v < bound.v ? x.v : y.v}; }
  friend Vector zero_if_less(Vector a, Vector bound, Vector x) { return {a.v < bound.v ? zero().v : x.v}; }
  friend Vector zero_unless_positive(Vector a, Vector x) { return {a.v <= zero().v ? zero().v : x.v}; }
  friend T sum(Vector a) {
    T total = a.v[0];
    for (int i = 1; i < W; i++) total += a.v[i];
    return total;
  }

  static Vector sums(const Vector* x) {
    Vector r;
    for (int i = 0; i < W; i++) r.v[i] = sum(x[i]);
    return r;
  }
  static void transpose(Vector* r) {
    Vector t[W];
    for (int i = 0; i < W; i++) t[i] = r[i];
    for (int i = 0; i < W; i++) {
      for (int j = 0; j < W; j++) r[i].v[j] = t[j].v[i];
    }
  }

 private:
  static float power2(int32_t n) {
    const int32_t bits = (n + 127) * (1 << 23);
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

inline void prefetch(const void*) {}

}  // namespace RMC_ISA
}  // namespace rmc
