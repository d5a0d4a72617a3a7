// Products for AVX-512 with VNNI: `vpdpbusd` adds four products of unsigned and signed bytes in each lane.
// One or two rows of activations meet weights in registers.
#pragma once

#include <type_traits>
#include <utility>

#include "registers512.h"

namespace MLA_ISA {

// Zeros in place of all but the first `count`.
inline __m256 first_of(__m256 x, int count) { return _mm256_maskz_mov_ps(static_cast<__mmask8>((1 << count) - 1), x); }
inline __m512 first_of(__m512 x, int count) { return _mm512_maskz_mov_ps(static_cast<__mmask16>((1 << count) - 1), x); }

// What a chunk is unpacked to, if at all.
struct Nothing {};
template <class F>
using Memory = std::conditional_t<kInRegisters<F>, Nothing, Codes<F::kGroup>>;

// A chunk that was unpacked to memory, seen as registers.
template <int kGroup>
struct InMemory {
  const Codes<kGroup>* chunk;

  static auto load(const float* numbers) {
    if constexpr (kGroup == 32)
      return _mm256_load_ps(numbers);
    else
      return _mm512_load_ps(numbers);
  }
  auto scales() const { return load(chunk->scales); }
  auto offsets() const { return load(chunk->offsets); }
  __m256i codes(int i) const {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk->codes + 32 * i));
  }
};

// Chunk `c` of row `r` as registers; of a format that has to be unpacked, that was unpacked to memory.
template <class F>
inline auto chunk_of(const Matrix& matrix, int64_t r, int c, const Memory<F>& memory) {
  if constexpr (kInRegisters<F>)
    return Chunk<F>({matrix.header + r * matrix.header_bytes, matrix.blocks + r * matrix.row_bytes}, c);
  else
    return InMemory<F::kGroup>{&memory};
}

template <class F>
inline int chunk_bytes(const Matrix& matrix) {
  if constexpr (kInRegisters<F>)
    return kChunk / F::kBlock * F::kBytes;
  else
    return kChunk / matrix.format->block * matrix.format->bytes;
}

// Adds up each of four registers.
inline __m128 add_across(const __m256* x) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

inline __m256 add_halves(__m256 x) { return x; }
inline __m256 add_halves(__m512 x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }

// The codes of a chunk, 64 in a register.
struct ChunkCodes {
  __m512i parts[4];

  template <class Source>
  explicit ChunkCodes(const Source& source) {
    for (int i = 0; i < 4; ++i)
      parts[i] = _mm512_inserti64x4(_mm512_castsi256_si512(source.codes(2 * i)), source.codes(2 * i + 1), 1);
  }

  // The products with a chunk of activations, summed over each group: 8 or 16 numbers.
  template <int kGroup>
  auto dots(const int8_t* x) const {
    __m512i dots[4];
    for (int i = 0; i < 4; ++i)
      dots[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), parts[i], _mm512_loadu_si512(x + 64 * i));
    // Each quarter of the register: the four sums over what the same quarters of the four have.
    const __m512i twos[] = {add_pairs(dots[0], dots[1]), add_pairs(dots[2], dots[3])};
    const __m512i fours = _mm512_add_epi32(_mm512_unpacklo_epi64(twos[0], twos[1]),
                                           _mm512_unpackhi_epi64(twos[0], twos[1]));
    if constexpr (kGroup == 16) {
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      return _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(order, fours));
    } else {
      const __m512i eights = _mm512_add_epi32(fours, _mm512_shuffle_i64x2(fours, fours, 0xB1));
      const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 8, 1, 9, 2, 10, 3, 11);
      return _mm256_cvtepi32_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi32(order, eights)));
    }
  }

 private:
  static __m512i add_pairs(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
};

inline __m256 times(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
inline __m512 times(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
inline __m256 plus(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m512 plus(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

// What a row of activations is to each group of a chunk: its scale, and its scaled sum.
template <int kGroup>
inline auto scales_of(const Activations& x, int row, int chunk) {
  const __m256 scales = _mm256_loadu_ps(x.scales_of(row) + 8 * chunk);
  if constexpr (kGroup == 32) {
    return scales;
  } else {
    const __m512i pairs = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(pairs, _mm512_castps256_ps512(scales));
  }
}
template <int kGroup>
inline auto sums_of(const Activations& x, int row, int chunk) {
  if constexpr (kGroup == 32)
    return _mm256_loadu_ps(x.sums32_of(row) + 8 * chunk);
  else
    return _mm512_loadu_ps(x.sums16_of(row) + 16 * chunk);
}

// The running dot products of some weight rows and some rows of activations, four at most. Those of a chunk are added
// up over its groups as `Panel` does, and then to those before it: so a result does not depend on who computes it.
template <int kRows, int kCount>
struct DotSums {
  __m128 sums = _mm_setzero_ps();

  // Adds the first `groups` groups of a chunk.
  template <int kGroup, class Source>
  void add(const Source* sources, const Activations& x, const int* rows, int chunk, int groups) {
    __m256 all[4] = {};
    for (int k = 0; k < kRows; ++k) {
      const ChunkCodes codes(sources[k]);
      auto scale = sources[k].scales(), offset = sources[k].offsets();
      if (groups < kChunk / kGroup) {  // the others may be anything
        scale = first_of(scale, groups);
        offset = first_of(offset, groups);
      }
      for (int t = 0; t < kCount; ++t) {
        const auto dots = codes.template dots<kGroup>(x.codes_of(rows[t]) + chunk * kChunk);
        const auto products = times(dots, times(scale, scales_of<kGroup>(x, rows[t], chunk)));
        all[k * kCount + t] = add_halves(plus(offset, sums_of<kGroup>(x, rows[t], chunk), products));
      }
    }
    sums = _mm_add_ps(sums, add_across(all));
  }

  void store(float* out) const {
    float totals[4];
    _mm_storeu_ps(totals, sums);
    std::memcpy(out, totals, sizeof(float) * kRows * kCount);
  }
};

template <class F, int kRows, int kCount>
struct IntegerDot {
  static constexpr int64_t kAhead = 8192;  // bytes; the hardware looks ahead by itself, but within a page alone

  template <int... k>
  static void add(const Matrix& matrix, int64_t r, int c, const Memory<F>* memory, const Activations& x,
                  const int* rows, DotSums<kRows, kCount>* sums, std::integer_sequence<int, k...>) {
    const decltype(chunk_of<F>(matrix, r, c, *memory)) chunks[] = {chunk_of<F>(matrix, r + k, c, memory[k])...};
    sums->template add<F::kGroup>(chunks, x, rows, c, groups_in<F>(matrix, c));
  }

  // The products of rows `r` and following with all the activations: out [kRows, kCount].
  [[gnu::always_inline]] static void meet(const Matrix& matrix, int64_t r, const Activations& x, const int* rows,
                                          float* out) {
    const int bytes = chunk_bytes<F>(matrix);
    const uint8_t* ahead = matrix.blocks + r * matrix.row_bytes + std::max(kAhead, kRows * matrix.row_bytes);
    DotSums<kRows, kCount> sums;
    // What is unpacked to memory in parts can be loaded whole after a while: one chunk later.
    Memory<F> memory[2][kRows];
    if constexpr (!kInRegisters<F>)
      for (int k = 0; k < kRows; ++k) unpack<F>(matrix, r + k, 0, &memory[0][k]);
    for (int c = 0; c * kChunk < matrix.size; ++c) {
      prefetch_weights(ahead, kRows * bytes);
      ahead += kRows * bytes;
      if constexpr (!kInRegisters<F>)
        for (int k = 0; k < kRows && (c + 1) * kChunk < matrix.size; ++k)
          unpack<F>(matrix, r + k, c + 1, &memory[(c + 1) % 2][k]);
      add(matrix, r, c, memory[c % 2], x, rows, &sums, std::make_integer_sequence<int, kRows>());
    }
    sums.store(out);
  }
};

// A chunk of columns of the transposed product, for kCount vectors: the sums over rows of a number times the row. Codes
// become floats, 32 columns of a few rows at a time, and meet for each vector what its number makes of their scale.
template <class F, int kCount>
class ColumnSums {
 public:
  static constexpr int kRows = 16;

  // Adds x[t * stride + i] times chunk `c` of row `r + i`, for `count` rows.
  void add(const Matrix& matrix, int64_t r, int count, int c, const float* x, int64_t stride) {
    Memory<F> memory[kRows];
    alignas(64) Factors factors;  // of each group
    const int groups = groups_in<F>(matrix, c);
    for (int i = 0; i < count; ++i) {
      if constexpr (!kInRegisters<F>) unpack<F>(matrix, r + i, c, &memory[i]);
      const auto chunk = chunk_of<F>(matrix, r + i, c, memory[i]);
      const __m512 scale = first_of(widen(chunk.scales()), groups), offset = first_of(widen(offsets_of(chunk)), groups);
      for (int t = 0; t < kCount; ++t) {
        const __m512 number = _mm512_set1_ps(x[t * stride + i]);
        _mm512_store_ps(factors[i][t], _mm512_mul_ps(scale, number));
        offsets_[t] = _mm512_fmadd_ps(offset, number, offsets_[t]);
      }
    }
    // Sums of one vector follow each other: four parts at a time keep the units busy meanwhile.
    constexpr int kParts = kCount == 1 ? 4 : 1;
    const int parts = (groups * F::kGroup + 31) / 32;
    int part = 0;
    for (; part + kParts <= parts; part += kParts) add_parts<kParts>(matrix, r, count, c, memory, factors, part);
    for (; part < parts; ++part) add_parts<1>(matrix, r, count, c, memory, factors, part);
  }

  void store(int t, float* out) const {
    alignas(64) float offsets[16];
    _mm512_store_ps(offsets, offsets_[t]);
    for (int v = 0; v < kChunk / 16; ++v)
      _mm512_storeu_ps(out + 16 * v, _mm512_add_ps(sums_[t][v], _mm512_set1_ps(offsets[16 * v / F::kGroup])));
  }

 private:
  using Factors = float[kRows][kCount][16];

  template <int kParts>
  void add_parts(const Matrix& matrix, int64_t r, int count, int c, const Memory<F>* memory, const Factors& factors,
                 int first) {
    __m512 sums[kParts][kCount][2];
    for (int p = 0; p < kParts; ++p)
      for (int t = 0; t < kCount; ++t)
        for (int half = 0; half < 2; ++half) sums[p][t][half] = sums_[t][2 * (first + p) + half];
    for (int i = 0; i < count; ++i) {
      const auto chunk = chunk_of<F>(matrix, r + i, c, memory[i]);
      for (int p = 0; p < kParts; ++p) {
        const __m512 low = numbers_of(chunk, first + p, 0), high = numbers_of(chunk, first + p, 1);
        for (int t = 0; t < kCount; ++t) {
          const float* factor = factors[i][t] + (first + p) * (32 / F::kGroup);
          sums[p][t][0] = _mm512_fmadd_ps(low, _mm512_set1_ps(factor[0]), sums[p][t][0]);
          sums[p][t][1] = _mm512_fmadd_ps(high, _mm512_set1_ps(factor[F::kGroup == 32 ? 0 : 1]), sums[p][t][1]);
        }
      }
    }
    for (int p = 0; p < kParts; ++p)
      for (int t = 0; t < kCount; ++t)
        for (int half = 0; half < 2; ++half) sums_[t][2 * (first + p) + half] = sums[p][t][half];
  }

  static __m512 widen(__m256 groups) { return _mm512_zextps256_ps512(groups); }
  static __m512 widen(__m512 groups) { return groups; }

  // Half of 32 columns as numbers that still need their scale and offset. Signed bytes are read as they are.
  template <class Source>
  static __m512 numbers_of(const Source& chunk, int part, int half) {
    const __m256i codes = chunk.codes(part);
    const __m128i bytes = half == 0 ? _mm256_castsi256_si128(codes) : _mm256_extracti128_si256(codes, 1);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
  }
  static __m512 numbers_of(const Chunk<Q8_0>& chunk, int part, int half) {
    const uint8_t* bytes = chunk.p + Q8_0::kBytes * part + 2 + 16 * half;
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
  }
  template <class Source>
  static auto offsets_of(const Source& chunk) {
    return chunk.offsets();
  }
  static __m256 offsets_of(const Chunk<Q8_0>&) { return _mm256_setzero_ps(); }

  __m512 sums_[kCount][kChunk / 16] = {};
  __m512 offsets_[kCount] = {};  // a lane for each group
};

}  // namespace MLA_ISA
