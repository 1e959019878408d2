// Eight floats of AVX2 with FMA; simd/avx512.h says what each operation is.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace rmc {
namespace RMC_ISA {

struct Simd {
  using T = float;
  static constexpr int W = 8;
  static constexpr int kTerms = 0;
  static constexpr int kMaxRows = 6;  // 6 x 2 accumulators, 2 weights and a broadcast: 15 of 16 registers
  static constexpr int kWideRows = 2;
  static constexpr int kGradRows = 4;
  __m256 v;

  static Simd load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Simd load_n(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  static Simd set(float x) { return {_mm256_set1_ps(x)}; }
  static Simd broadcast(const float* p, int lane) { return set(p[lane]); }
  static Simd zero() { return {_mm256_setzero_ps()}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_n(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }

  friend Simd operator+(Simd a, Simd b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Simd operator-(Simd a, Simd b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Simd operator*(Simd a, Simd b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Simd operator/(Simd a, Simd b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Simd operator&(Simd a, Simd b) { return {_mm256_and_ps(a.v, b.v)}; }
  friend Simd fma(Simd a, Simd b, Simd c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Simd fnma(Simd a, Simd b, Simd c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
  friend Simd max(Simd a, Simd b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Simd min(Simd a, Simd b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Simd abs(Simd a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
  friend Simd with_sign_of(Simd a, Simd sign) {
    return {_mm256_or_ps(a.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.f)))};
  }
  friend Simd round(Simd a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend Simd scale2(Simd a, Simd n) {  // in two factors, since 2^n itself may overflow or be denormal
    const __m256i i = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(i, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, power2(half)), power2(_mm256_sub_epi32(i, half)))};
  }
  friend Simd reciprocal(Simd a) { return {_mm256_div_ps(_mm256_set1_ps(1.f), a.v)}; }
  friend Simd if_less(Simd a, Simd bound, Simd x, Simd y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, bound.v, _CMP_LT_OQ))};
  }
  friend Simd zero_if_less(Simd a, Simd bound, Simd x) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.v, bound.v, _CMP_NLT_UQ), x.v)};
  }
  friend Simd zero_unless_positive(Simd a, Simd x) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NLE_UQ), x.v)};
  }
  friend float sum(Simd a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  static Simd sums(const Simd* x) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
    return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
  }

  static void transpose(Simd* r) {
    __m256 t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      r[i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
      r[4 + i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
    }
  }

 private:
  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m256 power2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
};

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace RMC_ISA
}  // namespace rmc
