// Products of 16 rows of weights, whose codes become columns, with any number of activations.
#pragma once

#include "products512.h"
#include "transpose512.h"

namespace MLA_ISA {

// Rows that are missing in the last tile are the last one again.
void arrange(const Selection& x, int64_t tile, ActivationTile* out) {
  const Activations& from = *x.source;
  int rows[ActivationTile::kRows];
  for (int i = 0; i < ActivationTile::kRows; ++i)
    rows[i] = x.row(std::min(static_cast<int>(tile) * ActivationTile::kRows + i, x.count - 1));
  const auto gather = [&](const auto& words_of, void* columns) {
    __m512i words[ActivationTile::kRows];
    for (int i = 0; i < ActivationTile::kRows; ++i) words[i] = words_of(rows[i]);
    transpose_words(words, columns);
  };
  const bool are_whole = mla::tiles_for(x.count) != nullptr;
  for (int64_t c = 0; c < from.chunks(); ++c, ++out) {
    for (int i = 0; are_whole && i < ActivationTile::kRows; ++i)
      std::memcpy(out->rows[i], from.codes_of(rows[i]) + c * kChunk, kChunk);
    for (int part = 0; !are_whole && part < 4; ++part)
      gather([&](int row) { return _mm512_loadu_si512(from.codes_of(row) + c * kChunk + 64 * part); },
             out->codes[16 * part]);
    gather([&](int row) {
      const __m256i scales = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.scales_of(row) + 8 * c));
      const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.sums32_of(row) + 8 * c));
      return _mm512_inserti64x4(_mm512_castsi256_si512(scales), sums, 1);
    }, out->scales);
    gather([&](int row) { return _mm512_loadu_si512(from.sums16_of(row) + 16 * c); }, out->sums16);
  }
}

// Adds the products of each lane's four codes with the same four activations. GCC makes copies and a load of its own
// of the intrinsic, which take as long as the products.
inline __m512i add_products(__m512i sums, __m512i codes, const int8_t* x) {
  typedef int32_t Four __attribute__((may_alias, aligned(1)));
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*reinterpret_cast<const Four*>(x)));
  return sums;
}

// As `unpack`, from registers where all of the chunk is there.
template <class F>
inline void unpack_fast(const Matrix& matrix, int64_t row, int chunk, Codes<F::kGroup>* out) {
  if constexpr (kInRegisters<F>)
    if (groups_in<F>(matrix, chunk) == kChunk / F::kGroup) {
      const Chunk<F> source({matrix.header + row * matrix.header_bytes, matrix.blocks + row * matrix.row_bytes}, chunk);
      const auto scales = source.scales(), offsets = source.offsets();
      std::memcpy(out->scales, &scales, sizeof(scales));
      std::memcpy(out->offsets, &offsets, sizeof(offsets));
      for (int i = 0; i < 8; ++i) {
        const __m256i codes = source.codes(i);
        std::memcpy(out->codes + 32 * i, &codes, sizeof(codes));
      }
      return;
    }
  unpack<F>(matrix, row, chunk, out);
}

// Adds the products of a chunk of 16 weight rows with kCount activations to `totals`, of the first `groups` groups.
template <int kGroup, int kCount, class Weights, class Rows>
[[gnu::always_inline]] inline void meet_chunk(const Weights& weights, const Rows& x, int groups, __m512* totals) {
  constexpr int kGroups = kChunk / kGroup, kQuads = kGroup / 4, kLevels = kGroup == 32 ? 3 : 4;
  __m512 parts[kLevels][kCount];  // sums over 1, 2, 4, ... groups that wait for as many others
  const auto meet_group = [&](int n) __attribute__((always_inline)) {
    const int g = kGroup == 32 ? n : n / 2 + 8 * (n % 2);
    __m512 products[kCount];
    for (int t = 0; t < kCount; ++t) products[t] = _mm512_setzero_ps();
    if (g < groups) {
      const __m512 scale = weights.scale(g), offset = weights.offset(g);
      __m512i dots[kCount];
      for (int t = 0; t < kCount; ++t) dots[t] = _mm512_setzero_si512();
#pragma GCC unroll 8  // or the sums are written to memory after each
      for (int q = 0; q < kQuads; ++q) {
        const __m512i codes = weights.codes(g * kQuads + q);
        for (int t = 0; t < kCount; ++t) dots[t] = add_products(dots[t], codes, x.codes(g * kQuads + q, t));
      }
      for (int t = 0; t < kCount; ++t) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scale(g, t)));
        products[t] = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t]), both);
        products[t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x.sum(g, t)), products[t]);
      }
    }
    int level = 0;
    for (; n >> level & 1; ++level)
      for (int t = 0; t < kCount; ++t) products[t] = _mm512_add_ps(parts[level][t], products[t]);
    for (int t = 0; t < kCount; ++t)
      if (n + 1 < kGroups)
        parts[level][t] = products[t];
      else
        totals[t] = _mm512_add_ps(totals[t], products[t]);
  };
  if constexpr (kCount <= 8) {
#pragma GCC unroll 16  // what codes are made of depends on the group
    for (int n = 0; n < kGroups; ++n) meet_group(n);
  } else {
    for (int n = 0; n < kGroups; ++n) meet_group(n);
  }
}

// Activations of a tile from some place on; one register counts through all of them.
template <int kGroup>
struct TileRows {
  static constexpr int kStride = ActivationTile::kRows;
  const int8_t (*first)[4];
  const float *scales, *sums;

  TileRows(const ActivationTile& x, int place)
      : first(x.codes[0] + place), scales(x.scales[0] + place), sums((kGroup == 32 ? x.sums32 : x.sums16)[0] + place) {}
  const int8_t* codes(int q, int t) const { return first[q * kStride + t]; }
  float scale(int g, int t) const { return scales[g * kGroup / 32 * kStride + t]; }
  float sum(int g, int t) const { return sums[g * kStride + t]; }
};

template <int kGroup>
struct Panel {
  static constexpr int kGroups = kChunk / kGroup, kQuads = kGroup / 4;
  Codes<kGroup> rows[kPanelRows];
  alignas(64) uint8_t quads[kChunk / 4][kPanelRows][4];  // four columns of a row beside the same four of the next
  alignas(64) float scales[16][kPanelRows];  // of kGroups
  alignas(64) float offsets[16][kPanelRows];
  int groups;  // that the chunk has: what is after them is not met

  Codes<kGroup>* row(int k) { return &rows[k]; }

  void finish(int num_groups) {
    groups = num_groups;
    for (int part = 0; part < 4; ++part)
      transpose_words(rows[0].codes + 64 * part, sizeof(rows[0]), quads[16 * part]);
    transpose_words(rows[0].scales, sizeof(rows[0]), scales);
    transpose_words(rows[0].offsets, sizeof(rows[0]), offsets);
  }

  __m512i codes(int q) const { return _mm512_load_si512(quads[q]); }
  __m512 scale(int g) const { return _mm512_load_ps(scales[g]); }
  __m512 offset(int g) const { return _mm512_load_ps(offsets[g]); }

  // sums[t][k] += dot(activations t, row k) for kCount rows of a tile, from the `first` on.
  template <int kCount>
  [[gnu::noinline]] void multiply_tile(const ActivationTile& x, int first, float* sums) const {
    __m512 totals[kCount];
    for (int t = 0; t < kCount; ++t) totals[t] = _mm512_loadu_ps(sums + t * kPanelRows);
    meet_chunk<kGroup, kCount>(*this, TileRows<kGroup>(x, first), groups, totals);
    for (int t = 0; t < kCount; ++t) _mm512_storeu_ps(sums + t * kPanelRows, totals[t]);
  }

  // sums[t][k] += dot(activations first + t, row k) over the chunk, of a tile's activations.
  void multiply(const Selection& x, int first, int chunk, const mla::TileProducts* registers, float* sums) const {
    const ActivationTile& tile = x.tiles[first / ActivationTile::kRows * x.source->chunks() + chunk];
    const int count = std::min(x.count - first, ActivationTile::kRows);
    if (registers != nullptr)
      return registers->multiply(kGroup, {quads[0][0], scales[0], offsets[0], groups}, tile, count, sums);
    int t = 0;
    const auto meet = [&](auto at_once) {
      constexpr int kCount = at_once;
      for (; t + kCount <= count; t += kCount) multiply_tile<kCount>(tile, t, sums + t * kPanelRows);
    };
    meet(std::integral_constant<int, 16>());
    meet(std::integral_constant<int, 8>());
    meet(std::integral_constant<int, 4>());
    meet(std::integral_constant<int, 2>());
    meet(std::integral_constant<int, 1>());
  }
};

}  // namespace MLA_ISA
