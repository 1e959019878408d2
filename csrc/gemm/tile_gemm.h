// gemm() and pack() on tiles of bf16 operands, multiplied by the TileProduct of the instruction set
// (gemm/amx_product.h, gemm/bf16_product.h). Left operands are split when a product starts, weights when they are
// packed.
//
// Operands: [panel][K / 32][term][row][16 words]. Weights: a line whose first number says whether some of them cannot
// be split, then [column / 16][K / 32][term][word][16 columns].
//
// A row that cannot be split takes no part in the tiles: it is multiplied with the sum of the terms of the weights, and
// every row is if weights cannot be split. So infinities and NaN travel as they do in plain float32 arithmetic, and
// still a row's result depends on that row alone.
#pragma once
#include <cstring>
#include <vector>

#include "gemm/gemm.h"
#include "gemm/pack.h"
#include "gemm/product.h"
#include "gemm/tiles.h"

namespace rmc {
namespace RMC_ISA {

// A chain of sums, as kBlockK. Errors are half of eager's with 64, 128 and 256; 256 is 6 to 12 % faster than 64.
constexpr int64_t kTileBlockK = 256;
constexpr int64_t kTilePanels = 16;  // panels that are split at once

template <class V>
class TileWeights {
 public:
  static constexpr int64_t kStep = V::kTerms * kTileWords;

  TileWeights(const float* packed, int64_t k) : packed_(packed), depth_((k + kTileK - 1) / kTileK) {}

  bool whole() const { return packed_[0] == 0; }
  int64_t depth() const { return depth_; }  // tiles of k
  int64_t column_stride() const { return depth_ * kStep; }
  // The tiles of the 16 columns number `column`.
  const uint32_t* tiles(int64_t column) const {
    return reinterpret_cast<const uint32_t*>(packed_ + 16) + column * column_stride();
  }

  // Row k of 16 columns, to the last bit (but what underflows a bf16).
  V row(int64_t column, int64_t k) const {
    const uint32_t* word = tiles(column) + k / kTileK * kStep + k % 16 * 16;
    V total = V::zero();
    for (int t = V::kTerms - 1; t >= 0; t--) {
      const __m512i pair = _mm512_load_si512(word + t * kTileWords);
      const __m512i high = _mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
      const __m512i half = k % kTileK < 16 ? _mm512_slli_epi32(pair, 16) : high;
      total = total + V{_mm512_castsi512_ps(half)};
    }
    return total;
  }

 private:
  const float* packed_;
  int64_t depth_;
};

// Terms of what store_pairs() cannot split: cut off instead of rounded, and an infinity or NaN in the first one alone.
template <int Terms>
inline void store_extreme_pairs(__m512 even, __m512 odd, uint32_t* to) {
  const __m512 upper = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xffff0000)));
  for (int t = 0; t < Terms; t++) {
    const __m512 a = _mm512_and_ps(even, upper), b = _mm512_and_ps(odd, upper);
    _mm512_store_si512(to + t * kTileWords, paired(a, b));
    even = _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(even), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ),
                               even, a);
    odd = _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(odd), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ), odd,
                              b);
  }
}

template <class V>
void tile_pack(const Matrix<V>& matrix, float* packed) {
  const TileWeights<V> weights(packed, matrix.k_axis.padded);
  uint32_t* words = reinterpret_cast<uint32_t*>(packed + 16);
  std::memset(packed, 0, 64);
  for (int64_t c = 0; c < matrix.column_axis.padded; c += 16) {
    for (int64_t k = 0; k < matrix.k_axis.padded; k += kTileK) {
      V even[16], odd[16];
      matrix.block(k, c, even);
      if (k + 16 < matrix.k_axis.padded) {
        matrix.block(k + 16, c, odd);
      } else {
        for (V& row : odd) row = V::zero();
      }
      uint32_t* to = words + c / 16 * weights.column_stride() + k / kTileK * weights.kStep;
      for (int i = 0; i < 16; i++, to += 16) {
        const __m512 left = store_pairs<V::kTerms>(even[i].v, odd[i].v, to);
        if (has_nan(left)) {
          packed[0] = 1;
          store_extreme_pairs<V::kTerms>(even[i].v, odd[i].v, to);
        }
      }
    }
  }
}

// Left operands of up to kTilePanels panels, and which of their rows cannot be split.
template <class V>
class TileOperands {
 public:
  static constexpr int64_t kStep = V::kTerms * kTileWords;
  struct Place {
    int64_t panel, row;
  };

  TileOperands(const Panels<V>& a, int64_t first, int64_t count)
      : a_(a),
        depth_((a.columns + kTileK - 1) / kTileK),
        memory_(TaskScratch::kOperands, static_cast<size_t>(count * stride()) * sizeof(uint32_t)),
        words_(memory_.as<uint32_t>()) {
    for (int64_t p = 0; p < count; p++) split(first + p, p);
  }

  int64_t stride() const { return depth_ * kStep; }
  const uint32_t* panel(int64_t p) const { return words_ + p * stride(); }
  const std::vector<Place>& extreme() const { return extreme_; }

 private:
  void split(int64_t from, int64_t p) {
    const int64_t chunks = a_.columns / 16, rows = a_.in_panel(from), step = a_.chunk_stride();
    const float* x = a_.panel(from);
    uint32_t* to = words_ + p * stride();
    __m512 left = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks; c += 2, x += 2 * step, to += kStep) {
      const bool pair = c + 1 < chunks;
      for (int64_t r = 0; r < rows; r++) {
        const __m512 even = _mm512_loadu_ps(x + r * 16);
        const __m512 odd = pair ? _mm512_loadu_ps(x + step + r * 16) : _mm512_setzero_ps();
        left = _mm512_add_ps(left, store_pairs<V::kTerms>(even, odd, to + r * 16));
      }
    }
    if (has_nan(left)) set_aside(from, p, rows);
  }

  void set_aside(int64_t from, int64_t p, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
      uint32_t* words = words_ + p * stride() + r * 16;
      __m512 left = _mm512_setzero_ps();
      for (int64_t c = 0; c < a_.columns / 16; c++)
        left = _mm512_add_ps(
            left, Split<V::kTerms>(V::load(a_.panel(from) + c * a_.chunk_stride() + r * 16).v).term[V::kTerms - 1]);
      if (!has_nan(left)) continue;
      extreme_.push_back({p, r});
      for (int64_t tile = 0; tile < depth_ * V::kTerms; tile++) std::memset(words + tile * kTileWords, 0, 64);
    }
  }

  const Panels<V>& a_;
  int64_t depth_;
  TaskScratch memory_;
  uint32_t* words_;
  std::vector<Place> extreme_;
};

// A block of 16 R rows and 16 C columns over `depth` tiles of k. bias: of the first columns, or null: c is added to.
template <class V, int R, int C>
void tile_block(const TileProduct& product, int64_t depth, const uint32_t* a, int64_t a_next, const uint32_t* w,
                int64_t w_next, Lines ahead, int32_t height, const float* bias, const float* mask, bool relu, float* c,
                int64_t c_next) {
  alignas(64) float sums[4 * 256];
  product.multiply<V::kTerms, R, C>(depth, a, a_next, w, w_next, ahead, sums);
  for (int i = 0; i < R; i++) {
    for (int j = 0; j < C; j++) {
      const float* from = sums + (2 * i + j) * 256;
      float* to = c + i * c_next + j * height * 16;
      const V start = bias ? V::load(bias + j * 16) : V::zero();
      for (int32_t r = 0; r < height; r++, from += 16, to += 16) {
        V y = (bias ? start : V::load(to)) + V::load(from);
        if (relu) y = max(V::zero(), y);  // a NaN stays one
        without_padding(y, mask, j * 16).store(to);
      }
    }
  }
}

template <class V>
using TileBlock = void (*)(const TileProduct&, int64_t, const uint32_t*, int64_t, const uint32_t*, int64_t, Lines,
                           int32_t, const float*, const float*, bool, float*, int64_t);

// One row of panel `panel` of the product by plain multiply-adds.
template <class V>
void exact_row(const Product<V>& product, int64_t panel, int64_t row, const TileWeights<V>& weights) {
  const auto& [a, first_a, bias, c, first_c, count, start, relu, mask] = product;
  const float* x = a.panel(first_a + panel) + row * 16;
  float* to = c.panel(first_c + panel) + row * 16;
  for (int64_t j = 0; j < c.columns / 16; j++, to += c.chunk_stride()) {
    V y = start == Start::kAccumulate ? V::load(to) : bias ? V::load(bias + j * 16) : V::zero();
    for (int64_t k = 0; k < a.columns; k++)
      y = fma(V::set(x[k / 16 * a.chunk_stride() + k % 16]), weights.row(j, k), y);
    if (relu) y = max(V::zero(), y);
    without_padding(y, mask, j * 16).store(to);
  }
}

// Each pair of panels fetches its share of the weights of the next columns.
template <class V>
Lines share_of(int64_t p, int64_t panels) {
  constexpr int64_t kLines = V::kTerms * kTileWords / 16;
  const int64_t pairs = (panels + 1) / 2;
  return {static_cast<int>(p / 2 * kLines / pairs), static_cast<int>((p / 2 + 1) * kLines / pairs)};
}

template <class V>
void tile_gemm(const Product<V>& product, const float* packed) {
  static constexpr float kNoBias[32] = {};
  static constexpr TileBlock<V> kBlocks[2][2] = {{tile_block<V, 1, 1>, tile_block<V, 1, 2>},
                                                 {tile_block<V, 2, 1>, tile_block<V, 2, 2>}};
  const auto& [a, first_a, bias, c, first_c, count, start, relu, mask] = product;
  const TileWeights<V> weights(packed, a.columns);
  for (int64_t first_panel = 0; first_panel < count; first_panel += kTilePanels) {
    const int64_t left = count - first_panel, panels = left < kTilePanels ? left : kTilePanels;
    if (!weights.whole()) {
      for (int64_t p = first_panel; p < first_panel + panels; p++) {
        for (int64_t r = 0; r < a.in_panel(first_a + p); r++) exact_row(product, p, r, weights);
      }
      continue;
    }
    const TileOperands<V> operands(a, first_a + first_panel, panels);
    {
      const TileProduct tiles(a.height);
      constexpr int64_t kBlock = kTileBlockK / kTileK;
      for (int64_t k = 0; k < weights.depth(); k += kBlock) {
        const int64_t depth = weights.depth() - k < kBlock ? weights.depth() - k : kBlock;
        const bool first = k == 0 && start == Start::kBias, last = k + depth == weights.depth();
        for (int64_t j = 0; j < c.columns / 16; j += 2) {
          const bool two = j + 1 < c.columns / 16;
          const uint32_t* w = weights.tiles(j) + k * weights.kStep;
          const float* b = !first ? nullptr : bias ? bias + j * 16 : kNoBias;
          for (int64_t p = 0; p < panels; p += 2) {
            kBlocks[p + 1 < panels][two](tiles, depth, operands.panel(p) + k * weights.kStep, operands.stride(), w,
                                         weights.column_stride(), share_of<V>(p, panels), a.height, b,
                                         mask ? mask + j * 16 : nullptr, relu && last,
                                         c.panel(first_c + first_panel + p) + j * c.chunk_stride(), c.stride());
          }
        }
      }
    }
    for (const auto& place : operands.extreme()) exact_row(product, first_panel + place.panel, place.row, weights);
  }
}

}  // namespace RMC_ISA
}  // namespace rmc
