// The kernels for one instruction set, MLA_ISA: `generic`, `avx2` or `avx512`.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "float_products.h"
#include "formats_iq4.h"
#include "formats_k.h"
#include "formats_legacy.h"
#include "products.h"

namespace MLA_ISA {

constexpr int kManyActivations = 8;  // from here on building panels pays

void quantise(Activations* out, int row) {
  const float* x = out->values_of(row);
  int8_t* codes = out->codes.data() + static_cast<size_t>(row) * out->padded;
  float* scales = out->scales.data() + static_cast<size_t>(row) * out->padded / 32;
  float* sums32 = out->sums32.data() + static_cast<size_t>(row) * out->padded / 32;
  float* sums16 = out->sums16.data() + static_cast<size_t>(row) * out->padded / 16;
  for (int group = 0; group < out->padded / 32; ++group) {
    float values[32] = {};
    std::memcpy(values, x + 32 * group, sizeof(float) * std::clamp(out->size - 32 * group, 0, 32));
    float largest = 0;
    for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(values[i]));
    // A number that is not finite makes the scale so, and with it every result that the group enters.
    float check = 0;
    for (int i = 0; i < 32; ++i) check += values[i] * 0;
    const bool usable = check == 0 && largest > 1e-30f;  // of less the inverse may be infinite
    const float inverse = usable ? 127 / largest : 0;
    int32_t low = 0, high = 0;
    for (int i = 0; i < 32; ++i) {
      const int32_t code = static_cast<int32_t>(std::nearbyint(usable ? values[i] * inverse : 0));
      codes[32 * group + i] = static_cast<int8_t>(code);
      (i < 16 ? low : high) += code;
    }
    scales[group] = usable ? largest / 127 : check;
    sums16[2 * group] = scales[group] * static_cast<float>(low);
    sums16[2 * group + 1] = scales[group] * static_cast<float>(high);
    sums32[group] = scales[group] * static_cast<float>(low + high);
  }
}

// A few activations: each weight row is unpacked once, 256 weights at a time, and met by all of them.
template <template <class, int> class Dot, class F, int kCount>
void multiply_few(const Matrix& matrix, int64_t begin, int64_t end, const Selection& x, int first, float* out,
                  int64_t stride) {
  int rows[kCount];
  for (int t = 0; t < kCount; ++t) rows[t] = x.row(first + t);
  for (int64_t r = begin; r < end; ++r) {
    float dots[kCount];
    Dot<F, kCount>::row(matrix, r, *x.source, rows, dots);
    for (int t = 0; t < kCount; ++t) out[(first + t) * stride + r] = dots[t];
  }
}

template <template <class, int> class Dot, class F>
void multiply_rows(const Matrix& matrix, int64_t begin, int64_t end, const Selection& x, float* out, int64_t stride) {
  int t = 0;
  for (; t + 4 <= x.count; t += 4) multiply_few<Dot, F, 4>(matrix, begin, end, x, t, out, stride);
  for (; t + 2 <= x.count; t += 2) multiply_few<Dot, F, 2>(matrix, begin, end, x, t, out, stride);
  if (t < x.count) multiply_few<Dot, F, 1>(matrix, begin, end, x, t, out, stride);
}

// 256 columns of 16 rows of quantised weights.
template <class F>
struct IntegerPanel : Panel<F::kGroup> {
  void fill(const Matrix& matrix, int64_t r, int rows, int chunk) {
    for (int k = 0; k < kPanelRows; ++k) unpack<F>(matrix, r + std::min(k, rows - 1), chunk, this->row(k));
    this->finish();
  }
};

// Many activations: 16 weight rows become a panel, which meets them in turn; the last row stands for missing ones.
template <template <class> class PanelOf, class F>
void multiply_panels(const Matrix& matrix, int64_t begin, int64_t end, const Selection& x, float* out, int64_t stride) {
  std::vector<float> sums(static_cast<size_t>(x.count) * kPanelRows);
  PanelOf<F> panel;
  for (int64_t r = begin; r < end; r += kPanelRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, end - r));
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int c = 0; static_cast<int64_t>(c) * kChunk < matrix.size; ++c) {
      panel.fill(matrix, r, rows, c);
      panel.multiply(x, c, sums.data());
    }
    for (int t = 0; t < x.count; ++t)
      std::memcpy(out + t * stride + r, sums.data() + static_cast<size_t>(t) * kPanelRows, sizeof(float) * rows);
  }
}

template <template <class, int> class Dot, template <class> class PanelOf, class F>
void multiply(const Matrix& matrix, int64_t begin, int64_t end, const Selection& x, float* out, int64_t stride) {
  if (x.count >= kManyActivations) return multiply_panels<PanelOf, F>(matrix, begin, end, x, out, stride);
  multiply_rows<Dot, F>(matrix, begin, end, x, out, stride);
}

template <class F>
void transposed_integers(const Matrix& matrix, int64_t begin, int count, const float* x, float* out) {
  std::fill(out, out + matrix.size, 0.0f);
  for (int c = 0; c * kChunk < matrix.size; ++c) {
    const int groups = static_cast<int>(std::min<int64_t>(kChunk, matrix.size - c * kChunk)) / F::kGroup;
    float* part = out + c * kChunk;
    for (int i = 0; i < count; ++i) {
      Codes<F::kGroup> chunk;
      unpack<F>(matrix, begin + i, c, &chunk);
      for (int g = 0; g < groups; ++g) {
        const float scale = x[i] * chunk.scales[g], offset = x[i] * chunk.offsets[g];
        for (int j = 0; j < F::kGroup; ++j)
          part[g * F::kGroup + j] += scale * static_cast<float>(chunk.codes[g * F::kGroup + j]) + offset;
      }
    }
  }
}

template <class F>
void transposed_floats(const Matrix& matrix, int64_t begin, int count, const float* x, float* out) {
  std::fill(out, out + matrix.size, 0.0f);
  for (int64_t first = 0; first < matrix.size; first += kChunk) {
    const int size = static_cast<int>(std::min<int64_t>(kChunk, matrix.size - first));
    for (int i = 0; i < count; ++i) {
      alignas(64) float weights[kChunk];
      F::widen(matrix.blocks + (begin + i) * matrix.row_bytes, first, size, weights);
      for (int j = 0; j < size; ++j) out[first + j] += x[i] * weights[j];
    }
  }
}

void gate(const float* gate, float* up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) up[i] *= gate[i] / (1 + exponential(-gate[i]));
}

void add(const float* x, float weight, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += weight * x[i];
}

template <class F>
constexpr mla::Format integers(const char* name, int header_bytes = 0) {
  return {name, F::kBlock, F::kBytes, header_bytes, false, multiply<IntegerDot, IntegerPanel, F>, transposed_integers<F>};
}

template <class F>
constexpr mla::Format floats(const char* name) {
  return {name, 1, F::kBytes, 0, true, multiply<FloatDot, FloatPanel, F>, transposed_floats<F>};
}

const mla::Format kFormats[] = {
    floats<F32>("f32"),        floats<F16>("f16"),          floats<BF16>("bf16"),      integers<Q8_0>("q8_0"),
    integers<Q4_0>("q4_0"),    integers<Q6_0>("q6_0"),      integers<Q4_K>("q4_K"),    integers<Q5_K>("q5_K"),
    integers<Q6_K>("q6_K"),    integers<IQ4_NL>("iq4_nl"),  integers<IQ4_XS>("iq4_xs"), integers<IQ4_KS>("iq4_ks", 4),
};

#define MLA_STRING_(x) #x
#define MLA_STRING(x) MLA_STRING_(x)
extern const mla::Kernels kernels;
const mla::Kernels kernels = {MLA_STRING(MLA_ISA), kFormats,       sizeof(kFormats) / sizeof(kFormats[0]),
                              quantise,            gate,           add,
                              read_slots,          attend_latents, attend_tile,
                              cache_reader};

}  // namespace MLA_ISA
