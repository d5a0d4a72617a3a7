// Products in plain loops, which the compiler turns into vector code.
#pragma once

namespace MLA_ISA {

template <int kGroup>
inline float dot_chunk(const Codes<kGroup>& weights, const Activations& x, int row, int chunk) {
  const int8_t* x_codes = x.codes_of(row) + chunk * kChunk;
  const float* x_scales = x.scales_of(row) + 8 * chunk;
  const float* x_sums = kGroup == 32 ? x.sums32_of(row) + 8 * chunk : x.sums16_of(row) + 16 * chunk;
  float total = 0;
  for (int g = 0; g < kChunk / kGroup; ++g) {
    int32_t dot = 0;
    for (int i = 0; i < kGroup; ++i)
      dot += static_cast<int32_t>(weights.codes[kGroup * g + i]) * static_cast<int32_t>(x_codes[kGroup * g + i]);
    total += weights.scales[g] * x_scales[g * kGroup / 32] * static_cast<float>(dot) + weights.offsets[g] * x_sums[g];
  }
  return total;
}

template <class F, int kCount>
struct IntegerDot {
  static void row(const Matrix& matrix, int64_t r, const Activations& x, const int* rows, float* out) {
    Codes<F::kGroup> weights;
    for (int t = 0; t < kCount; ++t) out[t] = 0;
    for (int c = 0; c * kChunk < matrix.size; ++c) {
      unpack<F>(matrix, r, c, &weights);
      for (int t = 0; t < kCount; ++t) out[t] += dot_chunk<F::kGroup>(weights, x, rows[t], c);
    }
  }
};

// A chunk of columns: the sums over some rows of a number times the row.
template <class F>
struct ColumnSums {
  float sums[kChunk] = {};

  void add(const Matrix& matrix, int64_t r, int chunk, float x) {
    Codes<F::kGroup> weights;
    unpack<F>(matrix, r, chunk, &weights);
    for (int g = 0; g < kChunk / F::kGroup; ++g) {
      const float scale = x * weights.scales[g], offset = x * weights.offsets[g];
      for (int i = g * F::kGroup; i < (g + 1) * F::kGroup; ++i)
        sums[i] += scale * static_cast<float>(weights.codes[i]) + offset;
    }
  }
  void store(float* out) const { std::memcpy(out, sums, sizeof(sums)); }
};

template <int kGroup>
struct Panel {
  Codes<kGroup> rows[kPanelRows];

  Codes<kGroup>* row(int k) { return &rows[k]; }
  void finish() {}

  void multiply(const Selection& x, int chunk, float* sums) const {
    for (int t = 0; t < x.count; ++t)
      for (int k = 0; k < kPanelRows; ++k)
        sums[t * kPanelRows + k] += dot_chunk<kGroup>(rows[k], *x.source, x.row(t), chunk);
  }
};

}  // namespace MLA_ISA
