// The kernels for one instruction set, MLA_ISA: `generic`, `avx2` or `avx512`.
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "float_products.h"
#include "formats_float4.h"
#include "formats_iq.h"
#include "formats_iq4.h"
#include "formats_iqk.h"
#include "formats_k.h"
#include "formats_legacy.h"
#include "formats_ternary.h"
#include "formats_trellis.h"
#include "products.h"
#include "quantise.h"

namespace MLA_ISA {

constexpr int64_t kLongRow = 1280;  // bytes

void quantise(Activations* out, int row) {
  const float* x = out->values_of(row);
  int8_t* codes = out->codes.data() + static_cast<size_t>(row) * out->padded;
  float* scales = out->scales.data() + static_cast<size_t>(row) * out->padded / 32;
  float* sums32 = out->sums32.data() + static_cast<size_t>(row) * out->padded / 32;
  float* sums16 = out->sums16.data() + static_cast<size_t>(row) * out->padded / 16;
  for (int group = 0; group < out->padded / 32; ++group) {
    Vector values[2] = {};
    const int left = out->size - 32 * group;
    if (left >= 32)
      std::memcpy(values, x + 32 * group, sizeof(values));
    else if (left > 0)
      std::memcpy(values, x + 32 * group, sizeof(float) * left);
    const int32_t bits = largest_bits(values);
    float largest;
    std::memcpy(&largest, &bits, 4);
    // A number that is not finite makes the scale NaN, and with it every result that the group enters.
    const bool finite = bits < 0x7F800000, usable = finite && largest > 1e-30f;  // or 127 / it may be infinite
    const float inverse = usable ? 127 / largest : 0;
    const Ints low = finite ? rounded(values[0] * inverse) : Ints{};
    const Ints high = finite ? rounded(values[1] * inverse) : Ints{};
    store_bytes(low, high, codes + 32 * group);
    scales[group] = usable ? largest / 127 : finite ? 0 : std::numeric_limits<float>::quiet_NaN();
    sums16[2 * group] = scales[group] * static_cast<float>(sum_of(low));
    sums16[2 * group + 1] = scales[group] * static_cast<float>(sum_of(high));
    sums32[group] = sums16[2 * group] + sums16[2 * group + 1];
  }
}

// One or two activations: weight rows are unpacked once, 256 weights at a time, and met by both.
template <class F, int kCount>
void multiply_few(const Matrix& matrix, int64_t end, const Selection& x, float* out, int64_t stride) {
  int rows[kCount];
  for (int t = 0; t < kCount; ++t) rows[t] = x.row(t);
  int64_t r = 0;
  const auto meet = [&](auto rows_at_once) {
    constexpr int kRows = rows_at_once;
    for (; r + kRows <= end; r += kRows) {
      float dots[kRows * kCount];
      IntegerDot<F, kRows, kCount>::meet(matrix, r, *x.source, rows, dots);
      for (int k = 0; k < kRows; ++k)
        for (int t = 0; t < kCount; ++t) out[t * stride + r + k] = dots[k * kCount + t];
    }
  };
  // Sums are added up across their registers four at a time; long rows come faster from memory if they are fewer.
  if (matrix.row_bytes < kLongRow) meet(std::integral_constant<int, 4 / kCount>());
  meet(std::integral_constant<int, 2 / kCount>());
  meet(std::integral_constant<int, 1>());
}

// 256 columns of 16 rows of quantised weights.
template <class F>
struct IntegerPanel : Panel<F::kGroup> {
  // From row `r` on; after the last chunk that from row `next` on will be wanted.
  void fill(const Matrix& matrix, int64_t r, int rows, int64_t next, int chunk) {
    if constexpr (kReadsPanels<F>)
      if (matrix.in_panels) return MLA_ISA::fill<F>(matrix, r, next, chunk, this);
    const int64_t bytes = kChunk / matrix.format->block * matrix.format->bytes;
    for (int k = 0; k < kPanelRows; ++k) {
      const int64_t row = r + std::min(k, rows - 1);
      // What comes next lies in as many places as there are rows: more than the hardware looks ahead in.
      const uint8_t* ahead = matrix.blocks + row * matrix.row_bytes + (chunk + 1) * bytes;
      if ((chunk + 1) * kChunk >= matrix.size) ahead = matrix.blocks + (next + k) * matrix.row_bytes;
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i);
      unpack_fast<F>(matrix, row, chunk, this->row(k));
    }
    this->finish(groups_in<F>(matrix, chunk));
  }
};

#if defined(__AVX512VNNI__)
template <class F>
void integer_columns(const Matrix& matrix, int64_t r, int rows, int chunk, float (*out)[kPanelRows]) {
  IntegerPanel<F> panel;
  panel.fill(matrix, r, rows, r + kPanelRows, chunk);
  for (int i = 0; i < kChunk; ++i) {
    const int g = i / F::kGroup;
    if (g >= panel.groups) {
      _mm512_storeu_ps(out[i], _mm512_setzero_ps());
      continue;
    }
    const __m512i codes = _mm512_and_si512(_mm512_srli_epi32(panel.codes(i / 4), i % 4 * 8), _mm512_set1_epi32(255));
    _mm512_storeu_ps(out[i], _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), panel.scale(g), panel.offset(g)));
  }
}

template <class F>
void float_columns(const Matrix& matrix, int64_t r, int rows, int chunk, float (*out)[kPanelRows]) {
  const int64_t first = static_cast<int64_t>(chunk) * kChunk;
  const int count = static_cast<int>(std::min<int64_t>(kChunk, matrix.size - first));
  alignas(64) float row[kPanelRows][kChunk] = {};
  for (int k = 0; k < kPanelRows; ++k)
    F::widen(matrix.blocks + (r + std::min(k, rows - 1)) * matrix.row_bytes, first, count, row[k]);
  for (int i = 0; i < kChunk; i += kPanelRows) transpose_words(row[0] + i, sizeof(row[0]), out[i]);
}

template <class F>
constexpr decltype(mla::Format::columns) kIntegerColumns = integer_columns<F>;
template <class F>
constexpr decltype(mla::Format::columns) kFloatColumns = float_columns<F>;
#else
template <class F>
constexpr decltype(mla::Format::columns) kIntegerColumns = nullptr;
template <class F>
constexpr decltype(mla::Format::columns) kFloatColumns = nullptr;
#endif

// The tile registers, if so many rows of activations use them, for as long as this lives.
struct TilesInUse {
  const mla::TileProducts* const products;

  TilesInUse(int count, int group) : products(mla::tiles_for(count)) {
    if (products != nullptr) products->begin(group);
  }
  ~TilesInUse() {
    if (products != nullptr) products->end();
  }
  TilesInUse(const TilesInUse&) = delete;
};

// More activations: 16 weight rows become a panel, the last row standing for missing ones. What 16 activations have in
// a chunk meets some panels in turn, while it is near.
template <class F>
void multiply_panels(const Matrix& matrix, int64_t begin, int64_t end, const Selection& x, float* out, int64_t stride) {
  constexpr int kPanels = 4, kStep = kPanels * kPanelRows;
  thread_local std::vector<float> kept;
  const int64_t size = static_cast<int64_t>(x.count) * kPanelRows;
  mla::hold(kPanels * size, &kept);
  float* const sums = kept.data();  // [panels, activations, rows]
  IntegerPanel<F> panels[kPanels];
  const TilesInUse tiles(x.count, F::kGroup);
  for (int64_t r = begin; r < end; r += kStep) {
    const int rows = static_cast<int>(std::min<int64_t>(kStep, end - r));
    const int count = (rows + kPanelRows - 1) / kPanelRows;
    std::fill_n(sums, count * size, 0.0f);
    for (int c = 0; static_cast<int64_t>(c) * kChunk < matrix.size; ++c) {
      for (int p = 0; p < count; ++p) {
        const int before = p * kPanelRows;
        panels[p].fill(matrix, r + before, std::min(kPanelRows, rows - before), r + before + kStep, c);
      }
      for (int first = 0; first < x.count; first += ActivationTile::kRows)
        for (int p = 0; p < count; ++p)
          panels[p].multiply(x, first, c, tiles.products, sums + p * size + first * kPanelRows);
    }
    for (int t = 0; t < x.count; ++t)
      for (int p = 0; p < count; ++p) {
        float* const to = out + t * stride + r + p * kPanelRows;
        const float* const from = sums + p * size + t * kPanelRows;
        const int left = rows - p * kPanelRows;
        if (left >= kPanelRows)
          std::memcpy(to, from, sizeof(float) * kPanelRows);  // a constant: GCC copies an unknown number more slowly
        else
          std::memcpy(to, from, sizeof(float) * left);
      }
  }
}

// Calls use(part, first, count) for rows [begin, end): `count` of them, from row `first` on, which begin `part`.
// What follows a row may be read up to a whole chunk, but not what follows the weight: its last rows are copied.
template <class Use>
void with_readable(const Matrix& matrix, int64_t begin, int64_t end, const Use& use) {
  const int64_t chunk = kChunk / matrix.format->block * matrix.format->bytes;
  const int64_t whole = (matrix.size + kChunk - 1) / kChunk * chunk, beyond = whole - matrix.row_bytes;
  const int64_t rows = matrix.row_bytes == 0 ? end : (matrix.end - matrix.blocks - beyond) / matrix.row_bytes;
  const int64_t in_place = std::clamp(rows, begin, end);
  use(matrix.from_row(begin), begin, in_place - begin);
  if (in_place == end) return;
  Matrix last = matrix.from_row(in_place);
  std::vector<uint8_t> copy((end - in_place) * matrix.row_bytes + beyond);
  std::copy_n(last.blocks, (end - in_place) * matrix.row_bytes, copy.begin());
  last.blocks = copy.data();
  last.end = last.blocks + copy.size();
  use(last, in_place, end - in_place);
}

template <class F>
void multiply_integers(const Matrix& matrix, int64_t begin, int64_t end, const Selection& x, float* out,
                       int64_t stride) {
  if constexpr (kReadsPanels<F>)
    if (matrix.in_panels && few_for_panels(x.count)) return multiply_in_panels<F>(matrix, begin, end, x, out, stride);
  if (x.count > mla::kFewRows) return multiply_panels<F>(matrix, begin, end, x, out, stride);
  with_readable(matrix, begin, end, [&](const Matrix& part, int64_t first, int64_t count) {
    if (x.count == 2) multiply_few<F, 2>(part, count, x, out + first, stride);
    if (x.count == 1) multiply_few<F, 1>(part, count, x, out + first, stride);
  });
}

template <class F, int kCount>
void transposed_tile(const Matrix& matrix, int64_t begin, int count, const Vectors& x, int first) {
  for (int c = 0; c * kChunk < matrix.size; ++c) {
    ColumnSums<F, kCount> sums;
    with_readable(matrix, begin, begin + count, [&](const Matrix& part, int64_t row, int64_t rows) {
      for (int i = 0; i < rows; i += sums.kRows)
        sums.add(part, i, std::min(static_cast<int>(rows) - i, sums.kRows), c, x.in(first) + row - begin + i, x.stride);
    });
    for (int t = 0; t < kCount; ++t) {
      float all[kChunk];
      sums.store(t, all);
      std::copy_n(all, std::min<int64_t>(kChunk, matrix.size - c * kChunk), x.to(first + t) + c * kChunk);
    }
  }
}

template <class F>
void transposed_integers(const Matrix& matrix, int64_t begin, int count, const Vectors& x) {
  if constexpr (kTransposesPanels<F>)
    if (matrix.in_panels) return transposed_in_panels<F>(matrix, begin, count, x);
  int t = 0;
  for (; t + 4 <= x.count; t += 4) transposed_tile<F, 4>(matrix, begin, count, x, t);
  for (; t < x.count; ++t) transposed_tile<F, 1>(matrix, begin, count, x, t);
}

void add(const float* x, float weight, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += weight * x[i];
}

template <class F>
void transposed_floats(const Matrix& matrix, int64_t begin, int count, const Vectors& x) {
  for (int t = 0; t < x.count; ++t) std::fill_n(x.to(t), matrix.size, 0.0f);
  for (int64_t first = 0; first < matrix.size; first += kChunk) {
    const int size = static_cast<int>(std::min<int64_t>(kChunk, matrix.size - first));
    for (int i = 0; i < count; ++i) {
      alignas(64) float weights[kChunk];
      F::widen(matrix.blocks + (begin + i) * matrix.row_bytes, first, size, weights);
      for (int t = 0; t < x.count; ++t) add(weights, x.in(t)[i], x.to(t) + first, size);
    }
  }
}

inline Vector silu(Vector x) {
  const Vector power = exponentials(x > 0 ? -x : x);  // never overflows
  return x * (x > 0 ? Vector{} + 1 : power) / (1 + power);
}

void gate(const float* gate, float* up, int64_t count) {
  Vector g = {}, u = {};
  for (; count >= kLanes; count -= kLanes, gate += kLanes, up += kLanes) {
    std::memcpy(&g, gate, sizeof(g));
    std::memcpy(&u, up, sizeof(u));
    u *= silu(g);
    std::memcpy(up, &u, sizeof(u));
  }
  if (count == 0) return;
  std::memcpy(&g, gate, sizeof(float) * count);
  std::memcpy(&u, up, sizeof(float) * count);
  u *= silu(g);
  std::memcpy(up, &u, sizeof(float) * count);
}

void normalise(const float* x, const float* weight, int64_t count, float epsilon, float* out) {
  float sums[kLanes] = {}, total = 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) sums[j] += x[i + j] * x[i + j];
  for (; i < count; ++i) total += x[i] * x[i];
  for (int j = 0; j < kLanes; ++j) total += sums[j];
  const float scale = 1 / std::sqrt(total / static_cast<float>(count) + epsilon);
  for (i = 0; i < count; ++i) out[i] = x[i] * scale * weight[i];
}

template <class F>
constexpr mla::Format integers(const char* name, int header_bytes = 0) {
  return {name, F::kBlock, F::kBytes, header_bytes, false, multiply_integers<F>,
          transposed_integers<F>, F::unpack, nullptr, false, kIntegerColumns<F>, kReadsPanels<F>, kTransposesPanels<F>};
}

// A format that is unpacked to memory first: all of them share what follows.
template <class F>
constexpr mla::Format unpacked(const char* name, int header_bytes = 0) {
  using Any = Unpacked<F::kGroup>;
  return {name, F::kBlock, F::kBytes, header_bytes, false, multiply_integers<Any>,
          transposed_integers<Any>, F::unpack, nullptr, false, kIntegerColumns<Any>};
}

template <class F>
constexpr mla::Format looked_up(const char* name, int header_bytes = 0) {
  mla::Format format = unpacked<F>(name, header_bytes);
  format.codebook = F::kCodebook;
  return format;
}

constexpr mla::Format narrow(mla::Format format) {
  format.narrow = true;
  return format;
}

template <class F>
constexpr mla::Format floats(const char* name) {
  return {name, 1, F::kBytes, 0, true, multiply_floats<F>, transposed_floats<F>,
          nullptr, nullptr, false, kFloatColumns<F>};
}

const mla::Format kFormats[] = {
    floats<F32>("f32"),                         floats<F16>("f16"),
    floats<BF16>("bf16"),                       integers<Q8_0>("q8_0"),
    narrow(integers<Q4_0>("q4_0")),             narrow(integers<Q6_0>("q6_0")),
    narrow(integers<Q4_K>("q4_K")),             narrow(integers<Q5_K>("q5_K")),
    narrow(integers<Q6_K>("q6_K")),             integers<IQ4_NL>("iq4_nl"),
    integers<IQ4_XS>("iq4_xs"),                 integers<IQ4_KS>("iq4_ks", 4),
    narrow(unpacked<Q4_1>("q4_1")),             narrow(unpacked<Q5_0>("q5_0")),
    narrow(unpacked<Q5_1>("q5_1")),             narrow(unpacked<IQ2_K>("iq2_k")),
    narrow(unpacked<IQ3_K>("iq3_k")),           unpacked<IQ4_K>("iq4_k"),
    unpacked<IQ5_K>("iq5_k"),                   unpacked<IQ6_K>("iq6_k"),
    narrow(unpacked<IQ2_KS>("iq2_ks", 2)),      narrow(unpacked<IQ3_KS>("iq3_ks", 2)),
    unpacked<IQ5_KS>("iq5_ks", 4),              unpacked<IQ4_KSS>("iq4_kss", 4),
    narrow(unpacked<IQ2_KL>("iq2_kl", 2)),      narrow(unpacked<Q2_K>("q2_K")),
    narrow(unpacked<Q3_K>("q3_K")),             unpacked<Q8_KV>("q8_KV", 8),
    unpacked<Q8_K_R8>("q8_k_r8"),               narrow(unpacked<TQ1_0>("tq1_0")),
    narrow(unpacked<TQ2_0>("tq2_0")),           narrow(unpacked<Q1_0>("q1_0_g128")),
    narrow(unpacked<IQ1_BN>("iq1_bn", 2)),      narrow(unpacked<IQ2_BN>("iq2_bn", 4)),
    narrow(unpacked<MXFP4>("mxfp4")),           narrow(unpacked<NVFP4>("nvfp4")),
    narrow(looked_up<IQ2_XXS>("iq2_xxs")),      narrow(looked_up<IQ2_XS>("iq2_xs")),
    narrow(looked_up<IQ2_S>("iq2_s")),          narrow(looked_up<IQ3_XXS>("iq3_xxs")),
    narrow(looked_up<IQ3_S>("iq3_s")),          narrow(looked_up<IQ1_S>("iq1_s")),
    narrow(looked_up<IQ1_M>("iq1_m")),          narrow(looked_up<IQ1_S_R4>("iq1_s_r4", 2)),
    narrow(looked_up<IQ1_M_R4>("iq1_m_r4", 2)), unpacked<IQ1_KT>("iq1_kt", 4),
    unpacked<IQ2_KT>("iq2_kt", 4),              unpacked<IQ3_KT>("iq3_kt", 4),
    unpacked<IQ4_KT>("iq4_kt", 4),
};

#define MLA_STRING_(x) #x
#define MLA_STRING(x) MLA_STRING_(x)
extern const mla::Kernels kernels;
const mla::Kernels kernels = {MLA_STRING(MLA_ISA), kFormats,       sizeof(kFormats) / sizeof(kFormats[0]),
                              quantise,            arrange,        gate,          normalise,
                              add,                 read_slots,     attend_latents, attend_tile,
                              nullptr,             nullptr,        cache_type};

}  // namespace MLA_ISA
