// Tiles of keys and values in pairs of bfloat16 numbers, whose products are added in float32 two at a time.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "tiles_float.h"

namespace MLA_ISA {

constexpr int kPairs = 16;  // in a register

// Whole registers of pairs for so many numbers.
inline int pairs_for(int size) { return static_cast<int>(mla::rounded_lanes(size)) * kPairs; }

inline __m512i load_pairs(const uint32_t* p) { return _mm512_loadu_si512(p); }

// sums + low * low + high * high, of each pair.
inline Part add_products(Part sums, __m512i x, __m512i y) {
  return (Part)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)y);
}

// Rounds 32 numbers: each pair is of neighbours.
inline __m512i to_pairs(const float* p) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p));
}

// Rounds 16 numbers and 16 others: each pair is of both.
inline __m512i pair_up(__m512 even, __m512 odd) {
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_or_si512(places, _mm512_slli_epi32(_mm512_add_epi32(places, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// From pairs of neighbours in two rows, 32 numbers each, to pairs of both rows: those of 16 numbers, then the others.
inline void interleave(const uint32_t* p, const uint32_t* q, uint32_t* out) {
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i first = _mm512_or_si512(places, _mm512_slli_epi32(_mm512_add_epi32(places, _mm512_set1_epi32(32)), 16));
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(load_pairs(p), first, load_pairs(q)));
  _mm512_storeu_si512(out + kPairs, _mm512_permutex2var_epi16(load_pairs(p), second, load_pairs(q)));
}

// Rounds numbers times a factor to pairs of neighbours; zeros fill the last register.
inline void round_numbers(const float* numbers, int count, uint32_t* out, float factor = 1) {
  for (int c = 0; c < count; c += 2 * kPairs, out += kPairs) {
    const uint32_t there = count - c >= 32 ? 0xFFFFFFFF : (1u << (count - c)) - 1;
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), numbers + c);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), numbers + c + kPairs);
    const __m512 times = _mm512_set1_ps(factor);
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, times), _mm512_mul_ps(low, times)));
  }
}

// Queries and keys in pairs of neighbours, values in pairs of slots.
struct PairTile {
  static constexpr int kSlots = 2 * kPairs;

  const uint32_t* queries;  // [queries, key_pairs]
  const uint32_t* keys;     // [slots, key_pairs]
  const uint32_t* values;   // [slots / 2, 2 * value_pairs]
  int key_pairs, value_pairs, value_size;

  PairTile from(int q, int slot) const {
    PairTile part = *this;
    part.queries += static_cast<int64_t>(q) * key_pairs;
    part.keys += static_cast<int64_t>(slot) * key_pairs;
    part.values += static_cast<int64_t>(slot) * value_pairs;
    return part;
  }
  // What of the weights enters the products, and so their sum.
  static Vector round(Vector weights) {
    const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weights));
    return (Vector)_mm512_slli_epi32(wide, 16);
  }
};

template <int kQueries>
void score(const PairTile& tile, int count, float (*scores)[PairTile::kSlots]) {
  constexpr int kSlots = kWidth / kQueries;
  const int size = tile.key_pairs;
  for (int s = 0; s < count; s += kSlots) {
    Part sums[kWidth] = {};
    const uint32_t* keys = tile.keys + static_cast<int64_t>(s) * size;
    for (int c = 0; c < size; c += kPairs) {
      __m512i key[kSlots];
      for (int j = 0; j < kSlots; ++j) key[j] = load_pairs(keys + j * size + c);
      for (int i = 0; i < kQueries; ++i) {
        const __m512i query = load_pairs(tile.queries + i * size + c);
        for (int j = 0; j < kSlots; ++j) sums[i * kSlots + j] = add_products(sums[i * kSlots + j], query, key[j]);
      }
    }
    float totals[kWidth];
    store_part(totals, add_across(sums));
    for (int i = 0; i < kQueries; ++i) std::memcpy(scores[i] + s, totals + i * kSlots, sizeof(float) * kSlots);
  }
}

template <int kQueries, int kParts>
void add_columns(const PairTile& tile, int pairs, const uint32_t (*weights)[kPairs], const float* shrink, int begin,
                 int end, float* out) {
  const int size = tile.value_size, stride = 2 * tile.value_pairs;
  for (int c = begin; c < end; c += kParts * kWidth) {
    const uint32_t* values = tile.values + c;
    Part total[kQueries][kParts];
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kParts; ++j) total[i][j] = load_part(out + i * size + c + j * kWidth) * shrink[i];
    for (int s = 0; s < pairs; ++s) {
      __m512i value[kParts];
      for (int j = 0; j < kParts; ++j) value[j] = load_pairs(values + s * stride + j * kWidth);
      for (int i = 0; i < kQueries; ++i) {
        const __m512i weight = _mm512_set1_epi32(static_cast<int>(weights[i][s]));
        for (int j = 0; j < kParts; ++j) total[i][j] = add_products(total[i][j], value[j], weight);
      }
    }
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kParts; ++j) store_part(out + i * size + c + j * kWidth, total[i][j]);
  }
}

// The slot after an odd number of them must be finite.
template <int kQueries>
void add_values(const PairTile& tile, int count, const float (*weights)[PairTile::kSlots], const float* shrink,
                float* out) {
  uint32_t pairs[kQueries][kPairs];
  for (int i = 0; i < kQueries; ++i) _mm512_storeu_si512(pairs[i], to_pairs(weights[i]));
  constexpr int kParts = kWidth / kQueries;
  const int whole = tile.value_size / (kParts * kWidth) * (kParts * kWidth);
  add_columns<kQueries, kParts>(tile, (count + 1) / 2, pairs, shrink, 0, whole, out);
  add_columns<kQueries, 1>(tile, (count + 1) / 2, pairs, shrink, whole, tile.value_size, out);
}

}  // namespace MLA_ISA
