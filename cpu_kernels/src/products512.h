// Products for AVX-512 with VNNI: `vpdpbusd` adds four products of unsigned and signed bytes in each lane.
// One or two rows of activations meet weights in registers, more of them panels in memory.
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

// How many groups chunk `c` of a row has.
template <class F>
inline int groups_in(const Matrix& matrix, int c) {
  return static_cast<int>(std::min<int64_t>(matrix.size - static_cast<int64_t>(c) * kChunk, kChunk)) / F::kGroup;
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
      for (const uint8_t* end = ahead + kRows * bytes; ahead < end; ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
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
    alignas(64) float factors[kRows][kCount][16];  // of each group
    const int groups = groups_in<F>(matrix, c);
    for (int i = 0; i < count; ++i) {
      if constexpr (!kInRegisters<F>) unpack<F>(matrix, r + i, c, &memory[i]);
      const auto chunk = chunk_of<F>(matrix, r + i, c, memory[i]);
      const __m512 scale = first_of(widen(chunk.scales()), groups), offset = first_of(widen(chunk.offsets()), groups);
      for (int t = 0; t < kCount; ++t) {
        const __m512 number = _mm512_set1_ps(x[t * stride + i]);
        _mm512_store_ps(factors[i][t], _mm512_mul_ps(scale, number));
        offsets_[t] = _mm512_fmadd_ps(offset, number, offsets_[t]);
      }
    }
    for (int part = 0; part < (groups * F::kGroup + 31) / 32; ++part) {
      __m512 sums[kCount][2];
      for (int t = 0; t < kCount; ++t)
        for (int half = 0; half < 2; ++half) sums[t][half] = sums_[t][2 * part + half];
      for (int i = 0; i < count; ++i) {
        const __m256i codes = chunk_of<F>(matrix, r + i, c, memory[i]).codes(part);
        const __m512 low = floats_of(_mm256_castsi256_si128(codes));
        const __m512 high = floats_of(_mm256_extracti128_si256(codes, 1));
        for (int t = 0; t < kCount; ++t) {
          const float* factor = factors[i][t] + part * (32 / F::kGroup);
          sums[t][0] = _mm512_fmadd_ps(low, _mm512_set1_ps(factor[0]), sums[t][0]);
          sums[t][1] = _mm512_fmadd_ps(high, _mm512_set1_ps(factor[F::kGroup == 32 ? 0 : 1]), sums[t][1]);
        }
      }
      for (int t = 0; t < kCount; ++t)
        for (int half = 0; half < 2; ++half) sums_[t][2 * part + half] = sums[t][half];
    }
  }

  void store(int t, float* out) const {
    alignas(64) float offsets[16];
    _mm512_store_ps(offsets, offsets_[t]);
    for (int v = 0; v < kChunk / 16; ++v)
      _mm512_storeu_ps(out + 16 * v, _mm512_add_ps(sums_[t][v], _mm512_set1_ps(offsets[16 * v / F::kGroup])));
  }

 private:
  static __m512 widen(__m256 groups) { return _mm512_zextps256_ps512(groups); }
  static __m512 widen(__m512 groups) { return groups; }
  static __m512 floats_of(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)); }

  __m512 sums_[kCount][kChunk / 16] = {};
  __m512 offsets_[kCount] = {};  // a lane for each group
};

// Turns 16 rows of 16 words of four bytes into columns; rows are `stride` bytes apart.
inline void transpose_words(const void* first, size_t stride, void* out) {
  const auto* rows = static_cast<const uint8_t*>(first);
  auto* columns = static_cast<uint8_t*>(out);
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

template <int kGroup>
struct Panel {
  static constexpr int kGroups = kChunk / kGroup, kQuads = kGroup / 4, kLevels = kGroup == 32 ? 3 : 4;
  Codes<kGroup> rows[kPanelRows];
  alignas(64) uint8_t codes[kChunk / 4][kPanelRows][4];  // four columns of a row beside the same four of the next
  alignas(64) float scales[16][kPanelRows];  // of kGroups
  alignas(64) float offsets[16][kPanelRows];

  Codes<kGroup>* row(int k) { return &rows[k]; }

  void finish() {
    for (int part = 0; part < 4; ++part)
      transpose_words(rows[0].codes + 64 * part, sizeof(rows[0]), codes[16 * part]);
    transpose_words(rows[0].scales, sizeof(rows[0]), scales);
    transpose_words(rows[0].offsets, sizeof(rows[0]), offsets);
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
    __m512 parts[kLevels][kCount];  // sums over 1, 2, 4, ... groups that wait for as many others
    for (int n = 0; n < kGroups; ++n) {
      const int g = kGroup == 32 ? n : n / 2 + 8 * (n % 2);
      const __m512 scale = _mm512_load_ps(scales[g]), offset = _mm512_load_ps(offsets[g]);
      __m512i dots[kCount];
      for (int t = 0; t < kCount; ++t) dots[t] = _mm512_setzero_si512();
      for (int q = 0; q < kQuads; ++q) {
        const __m512i weights = _mm512_load_si512(codes[g * kQuads + q]);
        for (int t = 0; t < kCount; ++t) dots[t] = add_products(dots[t], weights, x_codes[t] + g * kGroup + 4 * q);
      }
      __m512 products[kCount];
      for (int t = 0; t < kCount; ++t) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[t][g * kGroup / 32]));
        products[t] = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t]), both);
        products[t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x_sums[t][g]), products[t]);
      }
      int level = 0;
      for (; n >> level & 1; ++level)
        for (int t = 0; t < kCount; ++t) products[t] = _mm512_add_ps(parts[level][t], products[t]);
      for (int t = 0; t < kCount; ++t)
        if (n + 1 < kGroups)
          parts[level][t] = products[t];
        else
          total[t] = _mm512_add_ps(total[t], products[t]);
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
