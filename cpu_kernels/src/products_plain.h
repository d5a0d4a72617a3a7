// Products with weights that are unpacked to memory, 256 at a time.
#pragma once

#if defined(__AVX2__)
#include "dots256.h"
#else
#include "dots_plain.h"
#endif

namespace MLA_ISA {

constexpr decltype(mla::Kernels::arrange) arrange = nullptr;  // panels meet rows as they are

template <class F>
inline void unpack_fast(const Matrix& matrix, int64_t row, int chunk, Codes<F::kGroup>* out) {
  unpack<F>(matrix, row, chunk, out);
}

template <class F, int kRows, int kCount>
struct IntegerDot {
  // The products of rows `r` and following with all the activations: out [kRows, kCount].
  static void meet(const Matrix& matrix, int64_t r, const Activations& x, const int* rows, float* out) {
    std::fill(out, out + kRows * kCount, 0.0f);
    for (int k = 0; k < kRows; ++k, ++r, out += kCount)
      for (int c = 0; c * kChunk < matrix.size; ++c) {
        Codes<F::kGroup> weights;
        DotSums<kCount> sums;  // of a chunk, as those of a panel
        unpack<F>(matrix, r, c, &weights);
        sums.add(weights, x, rows, c);
        for (int t = 0; t < kCount; ++t) out[t] += sums.result(t);
      }
  }
};

// A chunk of columns, for kCount vectors: the sums over some rows of a number times the row.
template <class F, int kCount>
struct ColumnSums {
  static constexpr int kRows = 1;
  float sums[kCount][kChunk] = {};

  // Adds x[t * stride] times chunk `c` of row `r`.
  void add(const Matrix& matrix, int64_t r, int, int c, const float* x, int64_t stride) {
    Codes<F::kGroup> weights;
    unpack<F>(matrix, r, c, &weights);
    for (int t = 0; t < kCount; ++t)
      for (int g = 0; g < kChunk / F::kGroup; ++g) {
        const float scale = x[t * stride] * weights.scales[g], offset = x[t * stride] * weights.offsets[g];
        for (int i = g * F::kGroup; i < (g + 1) * F::kGroup; ++i)
          sums[t][i] += scale * static_cast<float>(weights.codes[i]) + offset;
      }
  }
  void store(int t, float* out) const { std::memcpy(out, sums[t], sizeof(sums[t])); }
};

template <int kGroup>
struct Panel {
  Codes<kGroup> rows[kPanelRows];

  Codes<kGroup>* row(int k) { return &rows[k]; }
  void finish(int) {}

  template <int kCount>
  void multiply_some(const Selection& x, int first, int chunk, float* sums) const {
    int places[kCount];
    for (int t = 0; t < kCount; ++t) places[t] = x.row(first + t);
    for (int k = 0; k < kPanelRows; ++k) {
      DotSums<kCount> dots;
      dots.add(rows[k], *x.source, places, chunk);
      for (int t = 0; t < kCount; ++t) sums[t * kPanelRows + k] += dots.result(t);
    }
  }

  void multiply(const Selection& x, int first, int chunk, const mla::TileProducts*, float* sums) const {
    const int count = std::min(x.count - first, ActivationTile::kRows);
    int t = 0;
    for (; t + 4 <= count; t += 4) multiply_some<4>(x, first + t, chunk, sums + t * kPanelRows);
    for (; t < count; ++t) multiply_some<1>(x, first + t, chunk, sums + t * kPanelRows);
  }
};

// Weights that are in panels already are for others: these are never defined.
template <class F>
constexpr bool kReadsPanels = false;
template <class F>
constexpr bool kTransposesPanels = false;
template <class F>
void fill(const Matrix& matrix, int64_t r, int64_t next, int c, Panel<F::kGroup>* out);
bool few_for_panels(int count);
template <class F>
void multiply_in_panels(const Matrix& matrix, int64_t begin, int64_t end, const Selection& x, float* out,
                        int64_t stride);
template <class F>
void transposed_in_panels(const Matrix& matrix, int64_t begin, int count, const Vectors& x);

}  // namespace MLA_ISA
