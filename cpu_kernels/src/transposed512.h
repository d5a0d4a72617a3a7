// The transposed product with panels. A register of codes is four columns of 16 rows; of each four rows it is turned by
// one shuffle, and then adds four rows to a column in every lane.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "panels512.h"

namespace MLA_ISA {

// Formats with one scale for 32 columns and one zero: a number of the vector times the scale becomes 16 bits.
template <class F, class = void>
constexpr bool kTransposesPanels = false;
template <class F>
constexpr bool kTransposesPanels<F, std::void_t<decltype(PanelChunk<F>::kZeroCode)>> = true;

// Adds the products of each lane's four codes with its four bytes.
inline __m512i add_products(__m512i sums, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));
  return sums;
}

// What 32 columns of up to 256 rows, in panels, add to those of a vector's product.
template <class F>
class TransposedBlock {
 public:
  static constexpr int kMaxPanels = 16;

  // The block that begins at `first`, and those of the other panels `stride` bytes apart.
  TransposedBlock(const uint8_t* first, int64_t stride, int panels) : first_(first), stride_(stride), panels_(panels) {}

  // Asks for what comes after the block, so that it is there in time.
  void prefetch(int64_t ahead) const {
    for (int p = 0; p < panels_; ++p) prefetch_weights(first_ + p * stride_ + ahead, kBytes);
  }

  // out[c] = or += sum over rows of x[row] * weight[row][c].
  void multiply(const float* x, bool adds, float* out) {
    quantise(x);
    __m512i high[8], low[8];  // sums of four columns and a quarter of the rows
    for (int q = 0; q < 8; ++q) high[q] = low[q] = _mm512_setzero_si512();
    for (int p = 0; p < panels_; ++p) {
      const PanelChunk<F> codes = panel(p);
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) {
        const __m512i four = turned(codes.codes(q));
        high[q] = add_products(high[q], four, high_[p]);
        low[q] = add_products(low[q], four, low_[p]);
      }
    }
    for (int half = 0; half < 2; ++half, out += 16) {
      const __m512i wholes = _mm512_slli_epi32(add_all(high + 4 * half), 8);
      const __m512i all = _mm512_sub_epi32(_mm512_add_epi32(wholes, add_all(low + 4 * half)), offset_);
      const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(scale_));
      _mm512_storeu_ps(out, adds ? _mm512_add_ps(_mm512_loadu_ps(out), product) : product);
    }
  }

  static constexpr int64_t kBytes = kPanelRows * F::kBytes;

 private:
  PanelChunk<F> panel(int p) const { return PanelChunk<F>(first_ + p * stride_, nullptr); }

  // Numbers times the scales of their rows become two bytes each, which have one scale for all rows.
  void quantise(const float* x) {
    __m512 scaled[kMaxPanels], top = _mm512_setzero_ps();
    __mmask16 no_numbers = 0;
    for (int p = 0; p < panels_; ++p) {
      scaled[p] = _mm512_mul_ps(_mm512_loadu_ps(x + kPanelRows * p), panel(p).scale(0));
      no_numbers |= _mm512_cmp_ps_mask(scaled[p], scaled[p], _CMP_UNORD_Q);
      top = _mm512_max_ps(top, _mm512_abs_ps(scaled[p]));
    }
    const float largest = _mm512_reduce_max_ps(top);
    const __mmask16 finite = no_numbers || std::isinf(largest) ? 0 : 0xFFFF;
    constexpr float kMost = 127 * 256;
    const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? kMost / largest : 0);
    scale_ = finite ? largest / kMost : std::numeric_limits<float>::quiet_NaN();
    __m512i sum = _mm512_setzero_si512();
    for (int p = 0; p < panels_; ++p) {
      const __m512i whole = _mm512_maskz_cvtps_epi32(finite, _mm512_mul_ps(scaled[p], inverse));
      sum = _mm512_add_epi32(sum, whole);
      // The lower byte is signed, so that the higher one is what is nearest.
      high_[p] = of_quarters(_mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8));
      low_[p] = of_quarters(whole);
    }
    offset_ = _mm512_set1_epi32(PanelChunk<F>::kZeroCode * _mm512_reduce_add_epi32(sum));
  }

  // From four columns of a row to four rows of a column.
  static __m512i turned(__m512i codes) {
    const __m128i places = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_shuffle_epi8(codes, _mm512_broadcast_i32x4(places));
  }

  // The lowest bytes of four rows in each lane of a quarter.
  static __m512i of_quarters(__m512i rows) {
    const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_epi32(places, _mm512_castsi128_si512(_mm512_cvtepi32_epi8(rows)));
  }

  // From the sums of 16 columns over each quarter of the rows to those over all.
  static __m512i add_all(const __m512i* four) {
    return add_quarters(add_quarters(four[0], four[1]), add_quarters(four[2], four[3]));
  }

  // Adds neighbouring quarters: two of x, then two of y.
  static __m512i add_quarters(__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xDD));
  }

  const uint8_t* first_;
  int64_t stride_;
  int panels_;
  float scale_;
  __m512i offset_, high_[kMaxPanels], low_[kMaxPanels];
};

// The transposed product of `count` rows from row `begin` on, whole panels both.
template <class F>
void transposed_in_panels(const Matrix& matrix, int64_t begin, int count, const Vectors& x) {
  constexpr int kMaxRows = TransposedBlock<F>::kMaxPanels * kPanelRows;
  constexpr int64_t kAhead = 2 * TransposedBlock<F>::kBytes;
  for (int row = 0; row < count; row += kMaxRows) {
    const uint8_t* first = matrix.from_row(begin + row).blocks;
    const int panels = std::min(count - row, kMaxRows) / kPanelRows;
    for (int64_t c = 0; c < matrix.size; c += F::kBlock, first += TransposedBlock<F>::kBytes) {
      TransposedBlock<F> block(first, kPanelRows * matrix.row_bytes, panels);
      block.prefetch(kAhead);
      for (int t = 0; t < x.count; ++t) block.multiply(x.in(t) + row, row > 0, x.to(t) + c);
    }
  }
}

}  // namespace MLA_ISA
