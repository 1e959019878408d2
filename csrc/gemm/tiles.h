// Operands of bf16 products in tiles, with every float32 number as Terms bf16 numbers that add up to it.
//
// Three terms hold all 24 bits of a float32, and of the nine products of two such operands the six that matter are
// added: what is dropped is below 2^-26 of the product. A tile has 16 rows of 32 bf16 numbers, paired in 32-bit words;
// which two of the 32 values of k are a pair is free as long as both operands agree, and here word i pairs k = i
// with k = 16 + i: two vectors of floats then become the words of a tile row by a shift and a blend.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace rmc {
namespace RMC_ISA {

constexpr int64_t kTileK = 32;       // values of k in an operand tile
constexpr int64_t kTileWords = 256;  // 32-bit words of an operand tile

inline __m512i bits(__m512 x) { return _mm512_castps_si512(x); }

// x rounded to the 8 bits of a bf16.
inline __m512 rounded_to_bf16(__m512 x) {
  const __m512i up = _mm512_add_epi32(bits(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// The upper halves of two vectors as pairs.
inline __m512i paired(__m512 even, __m512 odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(bits(even), 16), bits(odd));
}

// The terms of a vector, the last of which is not rounded. What cannot be split (infinite, NaN, or so large that
// rounding overflows) has a last term that is NaN.
template <int Terms>
struct Split {
  __m512 term[Terms];

  explicit Split(__m512 x) {
#pragma GCC unroll 3
    for (int t = 0; t + 1 < Terms; t++) {
      term[t] = rounded_to_bf16(x);
      x = _mm512_sub_ps(x, term[t]);
    }
    term[Terms - 1] = x;  // at most 8 bits are left
  }
};

// Two vectors rounded to bf16, as pairs; a NaN stays one.
inline __m512i rounded_pairs(__m512 even, __m512 odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleaved, halves);
}

// Writes the words of a tile row (or of a row of pairs) for all terms, which are kTileWords apart; returns what is NaN
// where the operands cannot be split.
template <int Terms>
inline __m512 store_pairs(__m512 even, __m512 odd, uint32_t* to) {
  if constexpr (Terms == 1) {
    _mm512_store_si512(to, rounded_pairs(even, odd));
    return _mm512_setzero_ps();  // every number has a bf16 beside it
  }
  const Split<Terms> a(even), b(odd);
#pragma GCC unroll 3
  for (int t = 0; t < Terms; t++) _mm512_store_si512(to + t * kTileWords, paired(a.term[t], b.term[t]));
  return _mm512_add_ps(a.term[Terms - 1], b.term[Terms - 1]);
}

inline bool has_nan(__m512 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }

// Cache lines of each step of k that are fetched ahead of the next two right operands.
struct Lines {
  int first = 0, end = 0;

  // b: a step of the first of two right operands, which are `next` words apart.
  void prefetch(const uint32_t* b, int64_t next) const {
    for (int i = first; i < end; i++) {
      _mm_prefetch(b + 2 * next + i * 16, _MM_HINT_T1);
      _mm_prefetch(b + 3 * next + i * 16, _MM_HINT_T1);
    }
  }
};

}  // namespace RMC_ISA
}  // namespace rmc
