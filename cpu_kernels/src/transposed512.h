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

// A vector's numbers times the scales of their rows, as two bytes each that have one scale for all rows.
struct ScaledVector {
  static constexpr int kMaxPanels = 16;
  float scale;
  __m512i sum, high[kMaxPanels], low[kMaxPanels];  // the sum is of 16 parts

  void set(const float* x, const __m512* scales, int panels) {
    __m512 scaled[kMaxPanels];
    __m512i top = _mm512_setzero_si512();  // magnitudes are in the order of their bits, above all what is no number
    for (int p = 0; p < panels; ++p) {
      scaled[p] = _mm512_mul_ps(_mm512_loadu_ps(x + kPanelRows * p), scales[p]);
      top = _mm512_max_epi32(top, _mm512_castps_si512(_mm512_abs_ps(scaled[p])));
    }
    const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(top))));
    const __mmask16 finite = std::isfinite(largest) ? 0xFFFF : 0;
    constexpr float kMost = 127 * 256;
    const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? kMost / largest : 0);
    scale = finite ? largest / kMost : std::numeric_limits<float>::quiet_NaN();
    sum = _mm512_setzero_si512();
    for (int p = 0; p < panels; ++p) {
      const __m512i whole = _mm512_maskz_cvtps_epi32(finite, _mm512_mul_ps(scaled[p], inverse));
      sum = _mm512_add_epi32(sum, whole);
      // The lower byte is signed, so that the higher one is what is nearest.
      high[p] = of_quarters(_mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8));
      low[p] = of_quarters(whole);
    }
  }

 private:
  // The lowest bytes of four rows in each lane of a quarter.
  static __m512i of_quarters(__m512i rows) {
    const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_epi32(places, _mm512_castsi128_si512(_mm512_cvtepi32_epi8(rows)));
  }
};

// 32 columns of up to 256 rows, in panels.
template <class F>
class TransposedBlock {
 public:
  static constexpr int64_t kBytes = kPanelRows * F::kBytes;

  // The block that begins at `first`, and those of the other panels `stride` bytes apart.
  TransposedBlock(const uint8_t* first, int64_t stride, int panels) : first_(first), stride_(stride), panels_(panels) {
    for (int p = 0; p < panels; ++p) scales_[p] = panel(p).scale(0);
  }

  // Asks for what comes after the block, so that it is there in time.
  void prefetch(int64_t ahead) const {
    for (int p = 0; p < panels_; ++p) prefetch_weights(first_ + p * stride_ + ahead, kBytes);
  }

  // x.to(t + i)[column + c] = or += sum over rows of x.in(t + i)[row + r] * weight[r][c], of kCount vectors.
  template <int kCount>
  void multiply(const Vectors& x, int t, int row, int64_t column) const {
    ScaledVector vectors[kCount];
    for (int i = 0; i < kCount; ++i) vectors[i].set(x.in(t + i) + row, scales_, panels_);
    __m512i sums[kCount][8];  // of four columns and a quarter of the rows
    for (int q = 0; q < 8; ++q) {
      __m512i high[kCount], low[kCount];
      for (int i = 0; i < kCount; ++i) high[i] = low[i] = _mm512_setzero_si512();
      for (int p = 0; p < panels_; ++p) {
        const __m512i four = turned(panel(p).codes(q));
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
          high[i] = add_products(high[i], four, vectors[i].high[p]);
          low[i] = add_products(low[i], four, vectors[i].low[p]);
        }
      }
      for (int i = 0; i < kCount; ++i) sums[i][q] = _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]);
    }
    for (int i = 0; i < kCount; ++i) {
      const __m512i offset = _mm512_set1_epi32(PanelChunk<F>::kZeroCode * _mm512_reduce_add_epi32(vectors[i].sum));
      const __m512 scale = _mm512_set1_ps(vectors[i].scale);
      float* out = x.to(t + i) + column;
      for (int half = 0; half < 2; ++half, out += 16) {
        const __m512i all = _mm512_sub_epi32(add_all(sums[i] + 4 * half), offset);
        // Fused in so many words: a compiler that fused for one count of vectors alone would have them differ.
        const __m512 before = row > 0 ? _mm512_loadu_ps(out) : _mm512_setzero_ps();
        _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), scale, before));
      }
    }
  }

 private:
  PanelChunk<F> panel(int p) const { return PanelChunk<F>(first_ + p * stride_, nullptr); }

  // From four columns of a row to four rows of a column.
  static __m512i turned(__m512i codes) {
    const __m128i places = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_shuffle_epi8(codes, _mm512_broadcast_i32x4(places));
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
  __m512 scales_[ScaledVector::kMaxPanels];
};

// The transposed product of `count` rows from row `begin` on, whole panels both.
template <class F>
void transposed_in_panels(const Matrix& matrix, int64_t begin, int count, const Vectors& x) {
  constexpr int kMaxRows = ScaledVector::kMaxPanels * kPanelRows;
  constexpr int64_t kAhead = 2 * TransposedBlock<F>::kBytes;
  for (int row = 0; row < count; row += kMaxRows) {
    const uint8_t* first = matrix.from_row(begin + row).blocks;
    const int panels = std::min(count - row, kMaxRows) / kPanelRows;
    for (int64_t c = 0; c < matrix.size; c += F::kBlock, first += TransposedBlock<F>::kBytes) {
      const TransposedBlock<F> block(first, kPanelRows * matrix.row_bytes, panels);
      block.prefetch(kAhead);
      int t = 0;
      for (; t + 4 <= x.count; t += 4) block.template multiply<4>(x, t, row, c);
      for (; t < x.count; ++t) block.template multiply<1>(x, t, row, c);
    }
  }
}

}  // namespace MLA_ISA
