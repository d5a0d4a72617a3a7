// Products of weights that are float32, float16 or bfloat16 with activations as they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "products.h"
#include "registers_float.h"

namespace MLA_ISA {

// `widen` turns `count` weights from place `first` of a row on into float32, `load` as many as a register has.
struct F32 {
  static constexpr int kBytes = 4;
  static void widen(const uint8_t* row, int64_t first, int count, float* out) {
    std::memcpy(out, row + 4 * first, sizeof(float) * count);
  }
  static Part load(const uint8_t* row, int64_t first) { return load_part(reinterpret_cast<const float*>(row) + first); }
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
  static Part load(const uint8_t* row, int64_t first) {
#if defined(__AVX512F__)
    return (Part)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * first)));
#else
    float numbers[kWidth];
    widen(row, first, kWidth, numbers);
    return load_part(numbers);
#endif
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
  static Part load(const uint8_t* row, int64_t first) {
    float numbers[kWidth];
    widen(row, first, kWidth, numbers);
    return load_part(numbers);
  }
};

// The running dot products of kRows weight rows and kCount rows of activations, each in kLanes sums: of every kLanes-th
// column. They stay in vectors of our own making: left to itself, the compiler rounds products in one count and not in
// another.
template <int kRows, int kCount>
struct FloatSums {
  static constexpr int kParts = mla::kLanes / kWidth;
  Part of[kRows][kCount][kParts];

  void add(const float (*weights)[kChunk], const float* const* x, int c) {
    for (int p = 0; p < kParts; ++p)
      for (int t = 0; t < kCount; ++t) {
        const Part values = load_part(x[t] + p * kWidth);
        for (int k = 0; k < kRows; ++k) of[k][t][p] += load_part(weights[k] + c + p * kWidth) * values;
      }
  }

  // Adds `count` columns from `first` on, of weights that zeros follow.
  void add_chunk(const float (*weights)[kChunk], const Selection& x, int place, int64_t first, int count) {
    const float* values[kCount];
    int c = 0;
    for (int t = 0; t < kCount; ++t) values[t] = x.source->values_of(x.row(place + t)) + first;
    for (; c + mla::kLanes <= count; c += mla::kLanes) {
      add(weights, values, c);
      for (int t = 0; t < kCount; ++t) values[t] += mla::kLanes;
    }
    if (c == count) return;
    float last[kCount][mla::kLanes] = {};
    for (int t = 0; t < kCount; ++t) values[t] = std::copy_n(values[t], count - c, last[t]) - (count - c);
    add(weights, values, c);
  }
};

// Sums [kRows, kLanes] of each of the activations from `place` on grow by a chunk.
template <int kRows, int kCount>
void add_chunk(const float (*weights)[kChunk], const Selection& x, int place, int64_t first, int count, float* sums) {
  FloatSums<kRows, kCount> running;
  constexpr int kParts = running.kParts;
  const auto at = [&](int t, int k, int p) { return sums + ((place + t) * kRows + k) * mla::kLanes + p * kWidth; };
  for (int k = 0; k < kRows; ++k)
    for (int t = 0; t < kCount; ++t)
      for (int p = 0; p < kParts; ++p) running.of[k][t][p] = load_part(at(t, k, p));
  running.add_chunk(weights, x, place, first, count);
  for (int k = 0; k < kRows; ++k)
    for (int t = 0; t < kCount; ++t)
      for (int p = 0; p < kParts; ++p) store_part(at(t, k, p), running.of[k][t][p]);
}

// Weight rows become float32 a few at a time, 256 columns of each, and meet all activations in turn; the last row
// stands for missing ones.
template <class F>
void multiply_floats(const Matrix& matrix, int64_t begin, int64_t end, const Selection& x, float* out, int64_t stride) {
  constexpr int kRows = 4, kTile = kWidth == mla::kLanes ? 4 : 2;
  std::vector<float> sums(static_cast<size_t>(x.count) * kRows * mla::kLanes);
  for (int64_t r = begin; r < end; r += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, end - r));
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t first = 0; first < matrix.size; first += kChunk) {
      const int count = static_cast<int>(std::min<int64_t>(kChunk, matrix.size - first));
      alignas(64) float weights[kRows][kChunk];
      for (int k = 0; k < kRows; ++k) {
        F::widen(matrix.blocks + (r + std::min(k, rows - 1)) * matrix.row_bytes, first, count, weights[k]);
        std::fill(weights[k] + count, weights[k] + mla::padded(count), 0.0f);
      }
      int t = 0;
      for (; t + kTile <= x.count; t += kTile) add_chunk<kRows, kTile>(weights, x, t, first, count, sums.data());
      for (; t < x.count; ++t) add_chunk<kRows, 1>(weights, x, t, first, count, sums.data());
    }
    for (int t = 0; t < x.count; ++t)
      for (int k = 0; k < rows; ++k) {
        float* lanes = sums.data() + (t * kRows + k) * mla::kLanes;
        for (int half = mla::kLanes / 2; half > 0; half /= 2)
          for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        out[t * stride + r + k] = lanes[0];
      }
  }
}

}  // namespace MLA_ISA
