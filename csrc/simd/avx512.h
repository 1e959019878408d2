// Sixteen floats of AVX-512. `Terms`: bf16 numbers that an operand of a product is split into for AMX (gemm/tiles.h); 0
// for products on the vectors themselves. Every header that is compiled per instruction set lives in the namespace
// RMC_ISA.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace rmc {
namespace RMC_ISA {

template <int Terms>
struct Vector16 {
  using T = float;
  static constexpr int W = 16;
  static constexpr int kTerms = Terms;
  // GEMM: 14 x 2 accumulators, 2 weights and a broadcast fill 31 registers; a tile has 16 rows.
  static constexpr int kMaxRows = Terms ? 16 : 14;
  static constexpr int kWideRows = 6;  // up to here 4 columns of vectors: 24 accumulators
  static constexpr int kGradRows = 8;  // weight gradients: outputs per kernel, two vectors of inputs each
  __m512 v;

  static Vector16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vector16 load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vector16 set(float x) { return {_mm512_set1_ps(x)}; }
  static Vector16 broadcast(const float* p, int lane) { return set(p[lane]); }  // p: W numbers
  static Vector16 zero() { return {_mm512_setzero_ps()}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_n(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }

  friend Vector16 operator+(Vector16 a, Vector16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vector16 operator-(Vector16 a, Vector16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vector16 operator*(Vector16 a, Vector16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vector16 operator/(Vector16 a, Vector16 b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vector16 operator&(Vector16 a, Vector16 b) { return {_mm512_and_ps(a.v, b.v)}; }                 // of bits
  friend Vector16 fma(Vector16 a, Vector16 b, Vector16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
  friend Vector16 fnma(Vector16 a, Vector16 b, Vector16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
  // Both return b where either operand is a NaN.
  friend Vector16 max(Vector16 a, Vector16 b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vector16 min(Vector16 a, Vector16 b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Vector16 abs(Vector16 a) { return {_mm512_abs_ps(a.v)}; }
  friend Vector16 with_sign_of(Vector16 a, Vector16 sign) {  // a >= 0
    return {_mm512_or_ps(a.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.f)))};
  }
  friend Vector16 round(Vector16 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  friend Vector16 scale2(Vector16 a, Vector16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a 2^n, n an integer
  // 1 / a for finite a: 2^-28 before the last rounding. A division costs 16 cycles of the port that GEMM needs too.
  friend Vector16 reciprocal(Vector16 a) {
    const __m512 y = _mm512_rcp14_ps(a.v);
    return {_mm512_fmadd_ps(y, _mm512_fnmadd_ps(a.v, y, _mm512_set1_ps(1.f)), y)};
  }
  // x where a < bound, y elsewhere, also where a is a NaN.
  friend Vector16 if_less(Vector16 a, Vector16 bound, Vector16 x, Vector16 y) {
    return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, bound.v, _CMP_LT_OQ), x.v)};
  }
  // x, or 0 where a < bound; where a is a NaN it is x.
  friend Vector16 zero_if_less(Vector16 a, Vector16 bound, Vector16 x) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, bound.v, _CMP_NLT_UQ), x.v)};
  }
  // x, or 0 where a <= 0; where a is a NaN it is x.
  friend Vector16 zero_unless_positive(Vector16 a, Vector16 x) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ), x.v)};
  }
  friend float sum(Vector16 a) { return _mm512_reduce_add_ps(a.v); }

  // Lane i of the result is the sum of the lanes of x[i]: about 2.8 instructions a sum.
  static Vector16 sums(const Vector16* x) {
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

  static void transpose(Vector16* r) {
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
