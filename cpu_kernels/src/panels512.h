// Weights in panels: of every block the 4-byte words of 16 rows lie beside each other, and 16 rows are lanes of a
// register without being moved. A float16 scale at an end of a block lies beside those of the other rows too.
#pragma once

#include "products_many512.h"

namespace MLA_ISA {

template <class F>
constexpr bool kReadsPanels = kInRegisters<F>;

inline __m512i load64(const uint8_t* p) { return _mm512_loadu_si512(p); }

inline __m512i nibbles_of(__m512i bytes, bool high) {
  return _mm512_and_si512(high ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
}

inline __m512i with_high_pairs(__m512i nibbles, __m512i bytes) {
  return _mm512_ternarylogic_epi32(nibbles, bytes, _mm512_set1_epi8(0x30), 0xF8);  // as of 32 bytes
}

inline __m512i non_linear(__m512i nibbles) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(reinterpret_cast<__m128i>(kNonLinear)), nibbles);
}

inline __m512 halves(__m256i halves) { return _mm512_cvtph_ps(halves); }
inline __m512 times(__m512i numbers, __m512 scale) { return _mm512_mul_ps(_mm512_cvtepi32_ps(numbers), scale); }
inline __m512i byte_of(__m512i words, int i) {
  return _mm512_and_si512(_mm512_srli_epi32(words, 8 * i), _mm512_set1_epi32(255));
}

// A chunk of 256 columns of 16 rows, which begins at `p`: `codes(q)` are those of columns 4 * q to 4 * q + 3.
template <class F>
struct PanelChunk;

// Blocks of 32 that begin with their scales.
template <class F, int kZero>
struct PanelOfBlocks {
  static constexpr int kZeroCode = kZero;
  const uint8_t* p;
  PanelOfBlocks(const uint8_t* p, const uint8_t*) : p(p) {}
  const uint8_t* block(int g) const { return p + g * kPanelRows * F::kBytes; }
  __m512i word(int g, int i) const { return load64(block(g) + 2 * kPanelRows + 64 * i); }
  __m512 scale(int g) const { return halves(load32(block(g))); }
  __m512 offset(int g) const { return _mm512_mul_ps(scale(g), _mm512_set1_ps(-kZero)); }
};

template <>
struct PanelChunk<Q8_0> : PanelOfBlocks<Q8_0, 128> {
  using PanelOfBlocks::PanelOfBlocks;
  __m512i codes(int q) const { return _mm512_xor_si512(word(q / 8, q % 8), _mm512_set1_epi8(-128)); }
};

template <>
struct PanelChunk<Q4_0> : PanelOfBlocks<Q4_0, 8> {
  using PanelOfBlocks::PanelOfBlocks;
  __m512i codes(int q) const { return nibbles_of(word(q / 8, q % 4), q % 8 >= 4); }
};

template <>
struct PanelChunk<IQ4_NL> : PanelOfBlocks<IQ4_NL, 127> {
  using PanelOfBlocks::PanelOfBlocks;
  __m512i codes(int q) const { return non_linear(nibbles_of(word(q / 8, q % 4), q % 8 >= 4)); }
};

template <>
struct PanelChunk<Q6_0> : PanelOfBlocks<Q6_0, 32> {
  using PanelOfBlocks::PanelOfBlocks;
  __m512i codes(int q) const {
    const int i = q % 4, first = 4 * (i / 2) + 2 * (q % 8 / 4);  // the lowest of the two bits in a byte of two words
    const __m512i high = word(q / 8, i % 2);
    const __m512i pairs = first < 4 ? _mm512_slli_epi16(high, 4 - first) : _mm512_srli_epi16(high, first - 4);
    return with_high_pairs(nibbles_of(word(q / 8, 2 + i), q % 8 >= 4), pairs);
  }
};

// Blocks of 256, whose scales are made when a chunk is begun.
template <class F>
struct PanelOfSuperblock {
  const uint8_t* p;
  __m512 scales[kChunk / F::kGroup], offsets[kChunk / F::kGroup];
  explicit PanelOfSuperblock(const uint8_t* p) : p(p) {}
  __m512i word(int i) const { return load64(p + 64 * i); }
  __m512 scale(int g) const { return scales[g]; }
  __m512 offset(int g) const { return offsets[g]; }

  // Eight scales and minima of six bits in words 1 to 3, and what multiplies them in word 0.
  void read_six_bits() {
    const __m512i low = word(1), high = word(2), mixed = word(3);
    const __m512i six = _mm512_set1_epi8(0x3F), four = _mm512_set1_epi8(0x0F), top = _mm512_set1_epi8(0x30);
    const auto end = [&](__m512i nibbles, __m512i pairs) {
      return _mm512_or_si512(_mm512_and_si512(nibbles, four), _mm512_and_si512(_mm512_srli_epi32(pairs, 2), top));
    };
    const __m512i scale_words[] = {_mm512_and_si512(low, six), end(mixed, low)};
    const __m512i minimum_words[] = {_mm512_and_si512(high, six), end(_mm512_srli_epi32(mixed, 4), high)};
    const __m512 scale = halves(_mm512_cvtepi32_epi16(word(0)));
    const __m512 lowest = halves(_mm512_cvtepi32_epi16(_mm512_srli_epi32(word(0), 16)));
    const __m512 minimum = _mm512_sub_ps(_mm512_setzero_ps(), lowest);
    for (int g = 0; g < 8; ++g) {
      scales[g] = times(byte_of(scale_words[g / 4], g % 4), scale);
      offsets[g] = times(byte_of(minimum_words[g / 4], g % 4), minimum);
    }
  }
};

template <>
struct PanelChunk<Q4_K> : PanelOfSuperblock<Q4_K> {
  PanelChunk(const uint8_t* p, const uint8_t*) : PanelOfSuperblock(p) { read_six_bits(); }
  __m512i codes(int q) const { return nibbles_of(word(4 + q / 16 * 8 + q % 8), q % 16 >= 8); }
};

template <>
struct PanelChunk<Q5_K> : PanelOfSuperblock<Q5_K> {
  PanelChunk(const uint8_t* p, const uint8_t*) : PanelOfSuperblock(p) { read_six_bits(); }
  __m512i codes(int q) const {
    const __m512i low = nibbles_of(word(12 + q / 16 * 8 + q % 8), q % 16 >= 8);
    const __m512i bit = _mm512_set1_epi8(static_cast<char>(1 << q / 8));
    return _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(word(4 + q % 8), bit), low, _mm512_set1_epi8(16));
  }
};

template <>
struct PanelChunk<Q6_K> : PanelOfSuperblock<Q6_K> {
  PanelChunk(const uint8_t* p, const uint8_t*) : PanelOfSuperblock(p) {
    const __m512 scale = halves(load32(p + 64 * 52));
    for (int g = 0; g < 16; ++g) {
      scales[g] = times(_mm512_srai_epi32(_mm512_slli_epi32(word(48 + g / 4), 24 - 8 * (g % 4)), 24), scale);
      offsets[g] = _mm512_mul_ps(scales[g], _mm512_set1_ps(-32));
    }
  }
  __m512i codes(int q) const {
    const int half = q / 32, quarter = q % 32 / 8;
    const __m512i low = nibbles_of(word(16 * half + 8 * (quarter % 2) + q % 8), quarter >= 2);
    const __m512i high = word(32 + 8 * half + q % 8);
    return with_high_pairs(low, quarter < 2 ? _mm512_slli_epi16(high, 4 - 2 * quarter)
                                            : _mm512_srli_epi16(high, 2 * quarter - 4));
  }
};

template <>
struct PanelChunk<IQ4_XS> : PanelOfSuperblock<IQ4_XS> {
  PanelChunk(const uint8_t* p, const uint8_t*) : PanelOfSuperblock(p) {
    const __m512i first = word(0), low = word(1), four = _mm512_set1_epi32(15), two = _mm512_set1_epi32(3);
    const __m512 scale = halves(_mm512_cvtepi32_epi16(first));
    for (int g = 0; g < 8; ++g) {
      const __m512i low_bits = _mm512_and_si512(_mm512_srli_epi32(low, 4 * g), four);
      const __m512i high_bits = _mm512_and_si512(_mm512_srli_epi32(first, 16 + 2 * g), two);
      const __m512i both = _mm512_or_si512(low_bits, _mm512_slli_epi32(high_bits, 4));
      scales[g] = times(_mm512_sub_epi32(both, _mm512_set1_epi32(32)), scale);
      offsets[g] = _mm512_mul_ps(scales[g], _mm512_set1_ps(-127));
    }
  }
  __m512i codes(int q) const { return non_linear(nibbles_of(word(2 + q / 8 * 4 + q % 4), q % 8 >= 4)); }
};

template <>
struct PanelChunk<IQ4_KS> : PanelOfSuperblock<IQ4_KS> {
  PanelChunk(const uint8_t* p, const uint8_t* header) : PanelOfSuperblock(p) {
    const __m512 scale = _mm512_loadu_ps(header);
    for (int g = 0; g < 8; ++g) {
      const __m512i byte = byte_of(word(g / 4), g % 4);
      const __m512i even = _mm512_and_si512(byte, _mm512_set1_epi32(254));
      const __m512i raised = _mm512_slli_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(1)), 2);
      scales[g] = times(_mm512_sub_epi32(even, _mm512_set1_epi32(127)), scale);
      offsets[g] = times(_mm512_sub_epi32(raised, _mm512_set1_epi32(127)), scales[g]);
    }
  }
  __m512i codes(int q) const { return non_linear(nibbles_of(word(2 + q / 8 * 4 + q % 4), q % 8 >= 4)); }
};

// Chunk `c` of the 16 rows from row `r` on, and where it lies.
template <class F>
inline const uint8_t* panel_place(const Matrix& matrix, int64_t r, int c) {
  return matrix.blocks + r * matrix.row_bytes + static_cast<int64_t>(c) * kPanelRows * chunk_bytes<F>(matrix);
}
template <class F>
inline PanelChunk<F> panel_chunk(const Matrix& matrix, int64_t r, int c) {
  return PanelChunk<F>(panel_place<F>(matrix, r, c), matrix.header + r * matrix.header_bytes);
}

// Unpacks a chunk of a panel once for many activations. After its last the panel from row `next` on will be unpacked.
template <class F>
inline void fill(const Matrix& matrix, int64_t r, int64_t next, int c, Panel<F::kGroup>* out) {
  const PanelChunk<F> chunk = panel_chunk<F>(matrix, r, c);
  out->groups = groups_in<F>(matrix, c);
  const int quads = out->groups * Panel<F::kGroup>::kQuads;
#pragma GCC unroll 64
  for (int q = 0; q < kChunk / 4; ++q)
    if (q < quads) _mm512_store_si512(out->quads[q], chunk.codes(q));
  for (int g = 0; g < out->groups; ++g) {
    _mm512_store_ps(out->scales[g], chunk.scale(g));
    _mm512_store_ps(out->offsets[g], chunk.offset(g));
  }
  // That is read after many products, too late for the hardware to look ahead.
  const bool goes_on = (c + 1) * kChunk < matrix.size;
  const uint8_t* const ahead = goes_on ? panel_place<F>(matrix, r, c + 1) : panel_place<F>(matrix, next, 0);
  for (int i = 0; i < kPanelRows * chunk_bytes<F>(matrix); i += 64) __builtin_prefetch(ahead + i, 0, 2);
}

// Few activations as they lie in memory.
template <int kGroup, int kCount>
struct PlainRows {
  const int8_t* codes_of[kCount];
  const float *scales[kCount], *sums[kCount];

  PlainRows(const Selection& x, int chunk) {
    for (int t = 0; t < kCount; ++t) {
      const int row = x.row(t);
      codes_of[t] = x.source->codes_of(row) + chunk * kChunk;
      scales[t] = x.source->scales_of(row) + 8 * chunk;
      sums[t] = kGroup == 32 ? x.source->sums32_of(row) + 8 * chunk : x.source->sums16_of(row) + 16 * chunk;
    }
  }
  const int8_t* codes(int q, int t) const { return codes_of[t] + 4 * q; }
  float scale(int g, int t) const { return scales[t][g * kGroup / 32]; }
  float sum(int g, int t) const { return sums[t][g]; }
};

// The products of a few activations, which `rows(chunk)` gives, with whole panels; out is of the first `count`.
template <class F, int kCount, class Rows>
void multiply_panels_by(const Matrix& matrix, int64_t begin, int64_t end, int count, const Rows& rows, float* out,
                        int64_t stride) {
  constexpr int64_t kAhead = 8192, kGroupBytes = kPanelRows * F::kGroup * F::kBytes / F::kBlock;
  const uint8_t* const last = matrix.blocks + end * matrix.row_bytes;
  for (int64_t r = begin; r < end; r += kPanelRows) {
    __m512 totals[kCount];
    for (int t = 0; t < kCount; ++t) totals[t] = _mm512_setzero_ps();
    for (int c = 0; static_cast<int64_t>(c) * kChunk < matrix.size; ++c) {
      const PanelChunk<F> chunk = panel_chunk<F>(matrix, r, c);
      const int groups = groups_in<F>(matrix, c);
      const uint8_t* ahead = chunk.p + kAhead;
      const bool goes_on = ahead >= last && matrix.next != nullptr;
      if (goes_on) ahead = matrix.next + (ahead - last);
      if (goes_on || ahead < matrix.end) prefetch_weights(ahead, groups * kGroupBytes);
      meet_chunk<F::kGroup, kCount>(chunk, rows(c), groups, totals);
    }
    for (int t = 0; t < count; ++t) _mm512_storeu_ps(out + t * stride + r, totals[t]);
  }
}

// Whether that many activations meet panels in registers; more of them meet what `fill` makes.
constexpr bool few_for_panels(int count) { return count <= ActivationTile::kRows; }
static_assert(!few_for_panels(mla::TileProducts::kFewest));

template <class F>
void multiply_in_panels(const Matrix& matrix, int64_t begin, int64_t end, const Selection& x, float* out,
                        int64_t stride) {
  const auto plain = [&](auto count) {
    constexpr int kCount = count;
    const auto rows = [&](int c) { return PlainRows<F::kGroup, kCount>(x, c); };
    multiply_panels_by<F, kCount>(matrix, begin, end, kCount, rows, out, stride);
  };
  const auto tile = [&](auto count) {  // rows past the last are that again
    const auto rows = [&](int c) { return TileRows<F::kGroup>(x.tiles[c], 0); };
    multiply_panels_by<F, count>(matrix, begin, end, x.count, rows, out, stride);
  };
  if (x.count == 1) return plain(std::integral_constant<int, 1>());
  if (x.count == 2) return plain(std::integral_constant<int, 2>());
  if (x.count <= 4) return tile(std::integral_constant<int, 4>());
  if (x.count <= 8) return tile(std::integral_constant<int, 8>());
  if (x.count <= 12) return tile(std::integral_constant<int, 12>());
  tile(std::integral_constant<int, 16>());
}

}  // namespace MLA_ISA
