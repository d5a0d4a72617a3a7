// Slots rounded to bfloat16: keys in pairs of neighbours, values in pairs of slots.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "attention.h"
#include "tiles_bf16.h"

namespace MLA_ISA {

// Rounding slots pays with many queries, and whoever keeps float32 wants exactness.
inline bool rounds(const LatentCache& cache, const Queries& queries) {
  return queries.count >= kManyQueries && !cache.is_exact();
}

// A register's pairs, a multiple of 64 bytes in memory.
struct alignas(64) Pairs {
  uint32_t of[kPairs];
};

// Rounds part of the row at `place`, counted over all pages; zeros fill the last register.
using RoundRow = void (*)(const CachePart& part, int64_t place, uint32_t* out);

inline void round_row(const CachePart& part, int64_t place, uint32_t* out) {
  thread_local std::vector<float> row;
  row.resize(part.size);
  part.type->read(part, place, row.data());
  round_numbers(row.data(), part.size, out);
}

inline void round_halves(const CachePart& part, int64_t place, uint32_t* out) {
  const uint8_t* p = static_cast<const uint8_t*>(part.low) + 2 * place * part.size;
  for (int c = 0; c < part.size; c += 2 * kPairs, p += 4 * kPairs, out += kPairs)
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)F16::load(p, kPairs), (__m512)F16::load(p, 0)));
}

inline void copy_rounded(const CachePart& part, int64_t place, uint32_t* out) {
  std::memcpy(out, static_cast<const uint8_t*>(part.low) + 2 * place * part.size, 2 * part.size);
}

inline void round_scaled(const CachePart& part, int64_t place, uint32_t* out) {
  const int8_t* p = static_cast<const int8_t*>(part.low) + place * part.size;
  const int blocks = part.size / 32;
  for (int b = 0; b < blocks; ++b, p += 32, out += kPairs) {
    const __m512 scale = _mm512_set1_ps(scale_at(part.scale, place * blocks + b));
    const auto half = [&](const int8_t* codes) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale);
    };
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(half(p + 16), half(p)));
  }
}

// The fastest that there is for a part of the cache.
inline RoundRow rounding_of(const CachePart& part) {
  const std::string_view type = part.type->name;
  if (type == "q8_0") return round_scaled;
  if (part.size % (2 * kPairs)) return round_row;
  return type == "f16" ? round_halves : type == "bf16" ? copy_rounded : round_row;
}

// Rounds part of the row at a place with `round`; zeros where there is no page.
inline void round_place(RoundRow round, const CachePart& part, int64_t place, uint32_t* out) {
  if (place < 0)
    std::fill_n(out, pairs_for(part.size), 0);
  else
    round(part, place, out);
}

// Rounds queries, whose rows have `size` numbers and `rope` that are rotated, each to whole registers.
inline void round_queries(const float* rows, int count, int size, int rope, float factor, uint32_t* out) {
  const int width = static_cast<int>(mla::padded(size + rope));
  for (int q = 0; q < count; ++q, rows += width, out += pairs_for(size) + pairs_for(rope)) {
    round_numbers(rows, size, out, factor);
    round_numbers(rows + size, rope, out + pairs_for(size), factor);
  }
}

class RoundedSlots {
 public:
  int key_pairs, value_pairs;

  // Keys have `size` numbers and `rope` that are rotated, each in whole registers.
  void resize(int slots, int size, int rope, int value_size) {
    key_pairs = pairs_for(size) + pairs_for(rope);
    value_pairs = pairs_for(value_size);
    keys_.resize(static_cast<size_t>(slots) * key_pairs / kPairs);
    values_.resize(static_cast<size_t>(slots) * value_pairs / kPairs);
  }

  uint32_t* key(int slot) { return keys_[0].of + static_cast<int64_t>(slot) * key_pairs; }
  uint32_t* value(int slot) { return values_[0].of + static_cast<int64_t>(slot) * value_pairs; }  // of an even one

  // Makes slots [begin, end) of a cache; an odd number is followed by zeros. None is asked for ahead: Intel's
  // processors do so by themselves, and arithmetic takes the time of others.
  void read_latents(const LatentCache& cache, const int32_t* pages, int begin, int end) {
    const RoundRow latent = rounding_of(cache.latent), rope = rounding_of(cache.rope);
    for (int slot = begin; slot < end; ++slot) {
      const int64_t place = place_of(cache, pages, slot);
      uint32_t* const row = key(slot - begin);
      round_place(latent, cache.latent, place, row);
      round_place(rope, cache.rope, place, row + value_pairs);
      if ((slot - begin) % 2) pair_values(slot - 1 - begin);
    }
    if ((end - begin) % 2) {
      std::fill_n(key(end - begin), key_pairs, 0);
      pair_values(end - 1 - begin);
    }
  }

  // Makes values after the first `count` zeros, up to a multiple of `slots`; of an odd number one is there already.
  void clear_values(int count, int slots) {
    std::fill(value((count + 1) / 2 * 2), value((count + slots - 1) / slots * slots), 0);
  }

 private:
  void pair_values(int slot) {
    for (int c = 0; c < value_pairs; c += kPairs) interleave(key(slot) + c, key(slot + 1) + c, value(slot) + 2 * c);
  }

  std::vector<Pairs> keys_, values_;
};

}  // namespace MLA_ISA
