// Products for AVX-512 with VNNI: `vpdpbusd` adds four products of unsigned and signed bytes in each of 16 lanes.
#pragma once

#include "registers512.h"

namespace MLA_ISA {

// Lanes of the products of 64 weights -> number of their group within the chunk.
template <int kGroup>
inline __m512i groups_of(int i) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_srli_epi32(lanes, kGroup == 32 ? 3 : 2), _mm512_set1_epi32(64 / kGroup * i));
}

// Zeros in place of all but the first `count`.
inline __m256 first_of(__m256 x, int count) { return _mm256_maskz_mov_ps(static_cast<__mmask8>((1 << count) - 1), x); }
inline __m512 first_of(__m512 x, int count) { return _mm512_maskz_mov_ps(static_cast<__mmask16>((1 << count) - 1), x); }

// The running dot products of one weight row and some rows of activations.
template <int kCount>
struct DotSums {
  __m512 products[kCount], offsets[kCount];

  DotSums() {
    for (int t = 0; t < kCount; ++t) products[t] = offsets[t] = _mm512_setzero_ps();
  }

  // Adds the first `groups` of a chunk.
  template <int kGroup, class Source>
  void add(const Source& source, const Activations& x, const int* rows, int chunk, int groups) {
    const auto scale = first_of(source.scales(), groups), offset = first_of(source.offsets(), groups);
    __m512 both[kCount];
    for (int t = 0; t < kCount; ++t) {
      const __m256 x_scale = _mm256_loadu_ps(x.scales_of(rows[t]) + 8 * chunk);
      if constexpr (kGroup == 32) {
        both[t] = _mm512_castps256_ps512(_mm256_mul_ps(scale, x_scale));
        const __m256 sums = _mm256_loadu_ps(x.sums32_of(rows[t]) + 8 * chunk);
        offsets[t] = _mm512_add_ps(offsets[t], _mm512_zextps256_ps512(_mm256_mul_ps(offset, sums)));
      } else {
        const __m512i pairs = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        both[t] = _mm512_mul_ps(scale, _mm512_permutexvar_ps(pairs, _mm512_castps256_ps512(x_scale)));
        const __m512 sums = _mm512_loadu_ps(x.sums16_of(rows[t]) + 16 * chunk);
        offsets[t] = _mm512_fmadd_ps(offset, sums, offsets[t]);
      }
    }
    for (int i = 0; i < (groups * kGroup + 63) / 64; ++i) {
      const __m512i codes = source.codes(i);
      for (int t = 0; t < kCount; ++t) {
        const __m512i x_codes = _mm512_loadu_si512(x.codes_of(rows[t]) + chunk * kChunk + 64 * i);
        const __m512i dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x_codes);
        const __m512 factor = _mm512_permutexvar_ps(groups_of<kGroup>(i), both[t]);
        products[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), factor, products[t]);
      }
    }
  }
};

// A chunk that was unpacked to memory, seen as registers.
template <int kGroup>
struct InMemory {
  Codes<kGroup> chunk;

  static auto load(const float* numbers) {
    if constexpr (kGroup == 32)
      return _mm256_load_ps(numbers);
    else
      return _mm512_load_ps(numbers);
  }
  auto scales() const { return load(chunk.scales); }
  auto offsets() const { return load(chunk.offsets); }
  __m512i codes(int i) const { return _mm512_load_si512(chunk.codes + 64 * i); }
};

// Calls f(chunk in registers, number of groups in it) for chunk `c` of row `r`, which the end of the row may cut.
template <class F, class Use>
inline void with_chunk(const Matrix& matrix, int64_t r, int c, const Use& f) {
  const int64_t left = std::min<int64_t>(matrix.size - static_cast<int64_t>(c) * kChunk, kChunk);
  const int groups = static_cast<int>(left) / F::kGroup;
  if constexpr (kInRegisters<F>) {
    constexpr int kBytes = kChunk / F::kBlock * F::kBytes;
    const uint8_t* header = matrix.header + r * matrix.header_bytes;
    const uint8_t* blocks = matrix.blocks + r * matrix.row_bytes + static_cast<int64_t>(c) * kBytes;
    if (left == kChunk) return f(Chunk<F>({header, blocks}, 0), kChunk / F::kGroup);
    alignas(64) uint8_t copy[kBytes];
    if (matrix.end - blocks < kBytes) {  // what follows the row may be read, but not what follows the weight
      std::memcpy(copy, blocks, matrix.end - blocks);
      blocks = copy;
    }
    f(Chunk<F>({header, blocks}, 0), groups);
  } else {
    InMemory<F::kGroup> stored;
    unpack<F>(matrix, r, c, &stored.chunk);
    f(stored, groups);
  }
}

template <class F, int kCount>
struct IntegerDot {
  static constexpr int kAhead = 4096;  // bytes; the hardware looks ahead by itself, but within a page alone

  static void row(const Matrix& matrix, int64_t r, const Activations& x, const int* rows, float* out) {
    const int chunk_bytes = kChunk / matrix.format->block * matrix.format->bytes;
    DotSums<kCount> sums;
    const uint8_t* ahead = matrix.blocks + r * matrix.row_bytes + kAhead;
    // What is unpacked to memory in parts can be loaded whole after a while: one chunk later.
    InMemory<F::kGroup> stored[2];
    if constexpr (!kInRegisters<F>) unpack<F>(matrix, r, 0, &stored[0].chunk);
    for (int c = 0; c * kChunk < matrix.size; ++c, ahead += chunk_bytes) {
      for (int line = 0; line < chunk_bytes; line += 64) _mm_prefetch(ahead + line, _MM_HINT_NTA);
      if constexpr (kInRegisters<F>) {
        with_chunk<F>(matrix, r, c, [&](const auto& weights, int groups) {
          sums.template add<F::kGroup>(weights, x, rows, c, groups);
        });
      } else {
        if ((c + 1) * kChunk < matrix.size) unpack<F>(matrix, r, c + 1, &stored[(c + 1) % 2].chunk);
        sums.template add<F::kGroup>(stored[c % 2], x, rows, c, kChunk / F::kGroup);
      }
    }
    for (int t = 0; t < kCount; ++t)
      out[t] = _mm512_reduce_add_ps(_mm512_add_ps(sums.products[t], sums.offsets[t]));
  }
};

// A chunk of columns: the sums over some rows of a number times the row.
template <class F>
struct ColumnSums {
  static constexpr int kVectors = kChunk / 16;
  __m512 products[kVectors], offsets = _mm512_setzero_ps();  // offsets: a lane for each group

  ColumnSums() {
    for (int v = 0; v < kVectors; ++v) products[v] = _mm512_setzero_ps();
  }
  static __m512 of_vector(__m512 groups, int v) {
    return _mm512_permutexvar_ps(_mm512_set1_epi32(16 * v / F::kGroup), groups);
  }
  static __m512 widen(__m256 groups) { return _mm512_zextps256_ps512(groups); }
  static __m512 widen(__m512 groups) { return groups; }

  void add(const Matrix& matrix, int64_t r, int c, float x) {
    with_chunk<F>(matrix, r, c, [&](const auto& weights, int groups) {
      const __m512 scale = _mm512_mul_ps(widen(first_of(weights.scales(), groups)), _mm512_set1_ps(x));
      offsets = _mm512_fmadd_ps(widen(first_of(weights.offsets(), groups)), _mm512_set1_ps(x), offsets);
      for (int v = 0; v < kVectors; v += 4) {
        alignas(64) uint8_t codes[64];
        _mm512_store_si512(codes, weights.codes(v / 4));
        for (int i = 0; i < 4; ++i) {
          const __m128i packed = _mm_load_si128(reinterpret_cast<const __m128i*>(codes + 16 * i));
          const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(packed));
          products[v + i] = _mm512_fmadd_ps(code, of_vector(scale, v + i), products[v + i]);
        }
      }
    });
  }
  void store(float* out) const {
    for (int v = 0; v < kVectors; ++v)
      _mm512_storeu_ps(out + 16 * v, _mm512_add_ps(products[v], of_vector(offsets, v)));
  }
};

// Turns 16 rows of 16 words of four bytes into columns; rows are `stride` bytes apart.
inline void transpose_words(const uint8_t* rows, size_t stride, uint8_t* columns) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j)
    for (int half = 0; half < 2; ++half) {
      b[8 * half + j] = _mm512_shuffle_i32x4(a[8 * half + j], a[8 * half + 4 + j], 0x88);
      b[8 * half + 4 + j] = _mm512_shuffle_i32x4(a[8 * half + j], a[8 * half + 4 + j], 0xDD);
    }
  for (int j = 0; j < 8; ++j) {
    _mm512_storeu_si512(columns + 64 * j, _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88));
    _mm512_storeu_si512(columns + 64 * (j + 8), _mm512_shuffle_i32x4(b[j], b[8 + j], 0xDD));
  }
}

template <int kGroup>
struct Panel {
  static constexpr int kGroups = kChunk / kGroup, kQuads = kGroup / 4;
  Codes<kGroup> rows[kPanelRows];
  alignas(64) uint8_t codes[kChunk / 4][kPanelRows][4];  // four columns of a row beside the same four of the next
  alignas(64) float scales[kGroups][kPanelRows];
  alignas(64) float offsets[kGroups][kPanelRows];

  Codes<kGroup>* row(int k) { return &rows[k]; }

  void finish() {
    for (int part = 0; part < 4; ++part)
      transpose_words(rows[0].codes + 64 * part, sizeof(rows[0]), codes[16 * part][0]);
    for (int k = 0; k < kPanelRows; ++k)
      for (int g = 0; g < kGroups; ++g) {
        scales[g][k] = rows[k].scales[g];
        offsets[g][k] = rows[k].offsets[g];
      }
  }

  template <int kCount>
  void multiply_tile(const Selection& x, int first, int chunk, float* sums) const {
    const int8_t* x_codes[kCount];
    const float *x_scales[kCount], *x_sums[kCount];
    __m512 total[kCount];
    for (int t = 0; t < kCount; ++t) {
      const int row = x.row(first + t);
      x_codes[t] = x.source->codes_of(row) + chunk * kChunk;
      x_scales[t] = x.source->scales_of(row) + 8 * chunk;
      x_sums[t] = kGroup == 32 ? x.source->sums32_of(row) + 8 * chunk : x.source->sums16_of(row) + 16 * chunk;
      total[t] = _mm512_loadu_ps(sums + (first + t) * kPanelRows);
    }
    for (int g = 0; g < kGroups; ++g) {
      const __m512 scale = _mm512_load_ps(scales[g]), offset = _mm512_load_ps(offsets[g]);
      __m512i dots[kCount];
      for (int t = 0; t < kCount; ++t) dots[t] = _mm512_setzero_si512();
      for (int q = 0; q < kQuads; ++q) {
        const __m512i weights = _mm512_load_si512(codes[g * kQuads + q]);
        for (int t = 0; t < kCount; ++t) {
          int32_t four;
          std::memcpy(&four, x_codes[t] + g * kGroup + 4 * q, 4);
          dots[t] = _mm512_dpbusd_epi32(dots[t], weights, _mm512_set1_epi32(four));
        }
      }
      for (int t = 0; t < kCount; ++t) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[t][g * kGroup / 32]));
        total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), both, total[t]);
        total[t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x_sums[t][g]), total[t]);
      }
    }
    for (int t = 0; t < kCount; ++t) _mm512_storeu_ps(sums + (first + t) * kPanelRows, total[t]);
  }

  // sums[t][k] += dot(activations t, row k) over the chunk.
  void multiply(const Selection& x, int chunk, float* sums) const {
    int t = 0;
    for (; t + 12 <= x.count; t += 12) multiply_tile<12>(x, t, chunk, sums);
    for (; t + 4 <= x.count; t += 4) multiply_tile<4>(x, t, chunk, sums);
    for (; t < x.count; ++t) multiply_tile<1>(x, t, chunk, sums);
  }
};

}  // namespace MLA_ISA
