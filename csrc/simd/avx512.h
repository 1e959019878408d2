// Sixteen floats of AVX-512. Every header that is compiled per instruction set lives in the namespace RMC_ISA.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace rmc {
namespace RMC_ISA {

struct Simd {
  using T = float;
  static constexpr int W = 16;
  static constexpr int kMaxRows = 14;  // GEMM: 14 x 2 accumulators, 2 weights and a broadcast fill 31 registers
  static constexpr int kWideRows = 6;  // up to here 4 columns of vectors: 24 accumulators
  static constexpr int kGradRows = 8;  // weight gradients: outputs per kernel, two vectors of inputs each
  __m512 v;

  static Simd load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Simd load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Simd set(float x) { return {_mm512_set1_ps(x)}; }
  static Simd zero() { return {_mm512_setzero_ps()}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_n(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }

  friend Simd operator+(Simd a, Simd b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Simd operator-(Simd a, Simd b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Simd operator*(Simd a, Simd b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Simd operator/(Simd a, Simd b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Simd fma(Simd a, Simd b, Simd c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
  friend Simd fnma(Simd a, Simd b, Simd c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
  // Both return b where either operand is a NaN.
  friend Simd max(Simd a, Simd b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Simd min(Simd a, Simd b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Simd abs(Simd a) { return {_mm512_abs_ps(a.v)}; }
  friend Simd with_sign_of(Simd a, Simd sign) {  // a >= 0
    return {_mm512_or_ps(a.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.f)))};
  }
  friend Simd round(Simd a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend Simd scale2(Simd a, Simd n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a 2^n, n an integer
  // 1 / a for finite a: 2^-28 before the last rounding. A division costs 16 cycles of the port that GEMM needs too.
  friend Simd reciprocal(Simd a) {
    const __m512 y = _mm512_rcp14_ps(a.v);
    return {_mm512_fmadd_ps(y, _mm512_fnmadd_ps(a.v, y, _mm512_set1_ps(1.f)), y)};
  }
  // x, or 0 where a < bound; where a is a NaN it is x.
  friend Simd zero_if_less(Simd a, Simd bound, Simd x) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, bound.v, _CMP_NLT_UQ), x.v)};
  }
  // x, or 0 where a <= 0; where a is a NaN it is x.
  friend Simd zero_unless_positive(Simd a, Simd x) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ), x.v)};
  }
  friend float sum(Simd a) { return _mm512_reduce_add_ps(a.v); }

  // Lane i of the result is the sum of the lanes of x[i]: about 2.8 instructions a sum.
  static Simd sums(const Simd* x) {
    __m512 t[8], u[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const __m512 a = x[2 * i].v, b = x[2 * i + 1].v;
      t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
      u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))};
  }

  static void transpose(Simd* r) {
    __m512 t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
      t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
      const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
      r[4 * i].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      r[4 * i + 2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
      r[4 * i + 3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512 a = _mm512_shuffle_f32x4(r[j].v, r[4 + j].v, 0x88);
      const __m512 b = _mm512_shuffle_f32x4(r[8 + j].v, r[12 + j].v, 0x88);
      const __m512 c = _mm512_shuffle_f32x4(r[j].v, r[4 + j].v, 0xdd);
      const __m512 d = _mm512_shuffle_f32x4(r[8 + j].v, r[12 + j].v, 0xdd);
      t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
      t[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
      t[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
      t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i].v = t[i];
  }

 private:
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
};

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace RMC_ISA
}  // namespace rmc
