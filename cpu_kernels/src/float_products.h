// Products of weights that are float32, float16 or bfloat16 with activations as they are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "products.h"
#include "registers_float.h"

namespace MLA_ISA {

// `widen` turns `count` weights from place `first` of a row on into float32.
struct F32 {
  static constexpr int kBytes = 4;
  static void widen(const uint8_t* row, int64_t first, int count, float* out) {
    std::memcpy(out, row + 4 * first, sizeof(float) * count);
  }
};

struct F16 {
  static constexpr int kBytes = 2;
  static void widen(const uint8_t* row, int64_t first, int count, float* out) {
    const uint8_t* p = row + 2 * first;
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2 * i));
      _mm512_storeu_ps(out + i, _mm512_cvtph_ps(halves));
    }
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * i));
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
    }
#endif
    for (; i < count; ++i) out[i] = half_at(p + 2 * i);
  }
};

struct BF16 {
  static constexpr int kBytes = 2;
  static void widen(const uint8_t* row, int64_t first, int count, float* out) {
    const uint8_t* p = row + 2 * first;
    for (int i = 0; i < count; ++i) {
      uint16_t high;
      std::memcpy(&high, p + 2 * i, 2);
      const uint32_t bits = static_cast<uint32_t>(high) << 16;
      std::memcpy(out + i, &bits, 4);
    }
  }
};

// 16 partial sums let the compiler add in vectors without reordering.
inline float dot_floats(const float* a, const float* b, int count) {
  float sums[16] = {}, total = 0;
  int i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; ++j) sums[j] += a[i + j] * b[i + j];
  for (; i < count; ++i) total += a[i] * b[i];
  for (int j = 0; j < 16; ++j) total += sums[j];
  return total;
}

template <class F, int kRows, int kCount>
struct FloatDot {
  // The products of rows `r` and following with all the activations: out [kRows, kCount].
  static void meet(const Matrix& matrix, int64_t r, const Activations& x, const int* rows, float* out) {
    std::fill(out, out + kRows * kCount, 0.0f);
    for (int k = 0; k < kRows; ++k, ++r, out += kCount)
      for (int64_t first = 0; first < matrix.size; first += kChunk) {
        const int count = static_cast<int>(std::min<int64_t>(kChunk, matrix.size - first));
        alignas(64) float weights[kChunk];
        F::widen(matrix.blocks + r * matrix.row_bytes, first, count, weights);
        for (int t = 0; t < kCount; ++t) out[t] += dot_floats(weights, x.values_of(rows[t]) + first, count);
      }
  }
};

// 256 columns of 16 weight rows, a column's 16 numbers beside each other.
template <class F>
struct FloatPanel {
  alignas(64) float columns[kChunk][kPanelRows];
  int64_t first;  // column of the matrix
  int count;

  void fill(const Matrix& matrix, int64_t r, int rows, int chunk) {
    first = static_cast<int64_t>(chunk) * kChunk;
    count = static_cast<int>(std::min<int64_t>(kChunk, matrix.size - first));
    for (int k = 0; k < kPanelRows; ++k) {
      alignas(64) float row[kChunk];
      F::widen(matrix.blocks + (r + std::min(k, rows - 1)) * matrix.row_bytes, first, count, row);
      for (int c = 0; c < count; ++c) columns[c][k] = row[c];
    }
  }

  // Sums stay in vectors of our own making: left to itself, the compiler rounds products in one count and not in another.
  template <int kCount>
  void multiply_tile(const Selection& x, int place, float* sums) const {
    const float* values[kCount];
    for (int t = 0; t < kCount; ++t) values[t] = x.source->values_of(x.row(place + t)) + first;
    for (int k = 0; k < kPanelRows; k += kWidth) {
      Part total[kCount];
      for (int t = 0; t < kCount; ++t) total[t] = load_part(sums + (place + t) * kPanelRows + k);
      for (int c = 0; c < count; ++c) {
        const Part column = load_part(columns[c] + k);
        for (int t = 0; t < kCount; ++t) total[t] += column * values[t][c];
      }
      for (int t = 0; t < kCount; ++t) store_part(sums + (place + t) * kPanelRows + k, total[t]);
    }
  }

  void multiply(const Selection& x, int, float* sums) const {
    int t = 0;
    for (; t + 8 <= x.count; t += 8) multiply_tile<8>(x, t, sums);
    for (; t < x.count; ++t) multiply_tile<1>(x, t, sums);
  }
};

}  // namespace MLA_ISA
