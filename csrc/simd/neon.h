// Four floats of ARM's Advanced SIMD, which every 64-bit ARM processor has; simd/avx512.h says what each operation is.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace rmc {
namespace RMC_ISA {

struct Simd {
  using T = float;
  static constexpr int W = 4;
  static constexpr int kTerms = 0;
  static constexpr int kMaxRows = 8;  // 8 x 2 accumulators for 4 units of latency 4, 8 rows of A, 2 weights: 26 of 32
  static constexpr int kWideRows = 5;
  static constexpr int kGradRows = 4;
  float32x4_t v;

  static Simd load(const float* p) { return {vld1q_f32(p)}; }
  static Simd load_n(const float* p, int64_t n) {
    float lanes[W] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
    return load(lanes);
  }
  static Simd set(float x) { return {vdupq_n_f32(x)}; }
  // A vector that is loaded once for all of its lanes: each multiply-add then takes its lane itself.
  static Simd broadcast(const float* p, int lane) { return {vdupq_n_f32(vld1q_f32(p)[lane])}; }
  static Simd zero() { return set(0); }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_n(float* p, int64_t n) const {
    float lanes[W];
    store(lanes);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(float));
  }

  friend Simd operator+(Simd a, Simd b) { return {vaddq_f32(a.v, b.v)}; }
  friend Simd operator-(Simd a, Simd b) { return {vsubq_f32(a.v, b.v)}; }
  friend Simd operator*(Simd a, Simd b) { return {vmulq_f32(a.v, b.v)}; }
  friend Simd operator/(Simd a, Simd b) { return {vdivq_f32(a.v, b.v)}; }
  friend Simd operator&(Simd a, Simd b) { return of_bits(vandq_u32(bits(a), bits(b))); }
  friend Simd fma(Simd a, Simd b, Simd c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  friend Simd fnma(Simd a, Simd b, Simd c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
  friend Simd max(Simd a, Simd b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }  // vmaxq gives a NaN of a, too
  friend Simd min(Simd a, Simd b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
  friend Simd abs(Simd a) { return {vabsq_f32(a.v)}; }
  friend Simd with_sign_of(Simd a, Simd sign) { return {vbslq_f32(vdupq_n_u32(0x80000000), sign.v, a.v)}; }
  friend Simd round(Simd a) { return {vrndnq_f32(a.v)}; }
  friend Simd scale2(Simd a, Simd n) {  // in two factors, since 2^n itself may overflow or be denormal
    const int32x4_t i = vcvtq_s32_f32(n.v), half = vshrq_n_s32(i, 1);
    return {vmulq_f32(vmulq_f32(a.v, power2(half)), power2(vsubq_s32(i, half)))};
  }
  friend Simd reciprocal(Simd a) { return set(1) / a; }
  friend Simd if_less(Simd a, Simd bound, Simd x, Simd y) { return {vbslq_f32(vcltq_f32(a.v, bound.v), x.v, y.v)}; }
  friend Simd zero_if_less(Simd a, Simd bound, Simd x) { return of_bits(vbicq_u32(bits(x), vcltq_f32(a.v, bound.v))); }
  friend Simd zero_unless_positive(Simd a, Simd x) { return of_bits(vbicq_u32(bits(x), vclezq_f32(a.v))); }
  friend float sum(Simd a) { return vaddvq_f32(a.v); }

  static Simd sums(const Simd* x) { return {vpaddq_f32(vpaddq_f32(x[0].v, x[1].v), vpaddq_f32(x[2].v, x[3].v))}; }

  static void transpose(Simd* r) {
    const float64x2_t a = pairs(vtrn1q_f32(r[0].v, r[1].v)), b = pairs(vtrn2q_f32(r[0].v, r[1].v));
    const float64x2_t c = pairs(vtrn1q_f32(r[2].v, r[3].v)), d = pairs(vtrn2q_f32(r[2].v, r[3].v));
    r[0].v = vreinterpretq_f32_f64(vtrn1q_f64(a, c)), r[1].v = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    r[2].v = vreinterpretq_f32_f64(vtrn2q_f64(a, c)), r[3].v = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
  }

 private:
  static uint32x4_t bits(Simd a) { return vreinterpretq_u32_f32(a.v); }
  static Simd of_bits(uint32x4_t a) { return {vreinterpretq_f32_u32(a)}; }
  static float64x2_t pairs(float32x4_t a) { return vreinterpretq_f64_f32(a); }
  static float32x4_t power2(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
  }
};

inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace RMC_ISA
}  // namespace rmc
