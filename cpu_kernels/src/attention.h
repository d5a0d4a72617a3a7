// Attention of groups of 16 queries, which stand side by side in a vector, to tiles of keys and values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cache_rows.h"
#include "kernels.h"

namespace MLA_ISA {

using mla::LatentCache;
using mla::Partials;
using mla::Queries;

constexpr int kLanes = 16;
constexpr int kTileSlots = 32;
constexpr int kSubtile = 8;  // slots whose sums are in registers at a time

typedef float Vector __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), may_alias));

constexpr float kNothing = -std::numeric_limits<float>::infinity();

inline Vector spread(float x) { return Vector{} + x; }

inline Vector largest(Vector a, Vector b) { return a > b ? a : b; }

// e to the x for |x| at most ln(2) / 2: seven terms of the series.
template <class T>
inline T exponential_of_rest(T x) {
  const T end = 0.16666667f + x * (0.041666668f + x * (0.0083333333f + x * 0.0013888889f));
  return 1 + x * (1 + x * (0.5f + x * end));
}

// e to the x: 2 to the whole part by its bits, times a polynomial of the rest; 2 units in the last place.
inline float exponential(float x) {
  const float scaled = std::min(std::max(x, -87.0f), 88.0f) * 1.44269504f;
  const float whole = std::floor(scaled + 0.5f);
  const float rest = (scaled - whole) * 0.69314718f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x == x ? exponential_of_rest(rest) * power : x;
}

// The same for 16 numbers that are at most 0.
inline Vector exponentials(Vector x) {
  const Vector scaled = largest(x, spread(-87.0f)) * 1.44269504f;
  const Ints whole = __builtin_convertvector(scaled - 0.5f, Ints);  // of a number below 0: rounds to the nearest
  const Vector rest = (scaled - __builtin_convertvector(whole, Vector)) * 0.69314718f;
  const Vector result = exponential_of_rest(rest) * reinterpret_cast<Vector>((whole + 127) << 23);
  return x == x ? result : x;
}

// Folds `count` slots, a multiple of `kSubtile` of which those from `end` on do not count, into one group's state.
inline void fold_slots(const float* keys, int key_size, const float* values, int value_size, int64_t stride, int first,
                       int count, const Vector* query, Ints limits, float scale, Vector* top_state, Vector* sum_state,
                       Vector* out) {
  Vector score[kTileSlots];
  Vector top = *top_state;
  for (int s = 0; s < count; s += kSubtile) {
    Vector sums[kSubtile] = {};
    const float* key = keys + s * stride;
    for (int c = 0; c < key_size; ++c) {
      const Vector q = query[c];
      for (int j = 0; j < kSubtile; ++j) sums[j] += q * key[j * stride + c];
    }
    for (int j = 0; j < kSubtile; ++j) {
      const Ints seen = limits >= first + s + j;
      score[s + j] = seen ? sums[j] * scale : spread(kNothing);
      top = score[s + j] > top || score[s + j] != score[s + j] ? score[s + j] : top;  // a NaN stays
    }
  }
  // A query that has seen nothing yet keeps its top at minus infinity: take 0 instead, all its weights are 0.
  const Ints none = top == spread(kNothing);
  const Vector base = none ? Vector{} : top;
  const Vector shrink = none ? spread(1.0f) : exponentials(*top_state - base);
  Vector sum = *sum_state * shrink;
  for (int s = 0; s < count; ++s) {
    const Ints hidden = score[s] == spread(kNothing);
    score[s] = hidden ? Vector{} : exponentials(score[s] - base);
    sum += score[s];
  }
  *sum_state = sum;
  *top_state = top;
  for (int c = 0; c < value_size; ++c) out[c] *= shrink;
  for (int s = 0; s < count; s += kSubtile) {
    const float* value = values + s * stride;
    for (int c = 0; c < value_size; ++c) {
      Vector total = out[c];
      for (int j = 0; j < kSubtile; ++j) total += score[s + j] * value[j * stride + c];
      out[c] = total;
    }
  }
}

// Keys and values must be readable and finite up to the next multiple of `kSubtile` slots after `end`.
void attend_tile(const float* keys, int key_size, const float* values, int value_size, int64_t stride, int begin,
                 int end, const Queries& queries, const Partials& partials) {
  for (int g = 0; g < queries.groups; ++g) {
    Ints limits;
    std::memcpy(&limits, queries.positions + g * kLanes, sizeof(limits));
    int furthest = -1;
    for (int i = 0; i < kLanes; ++i) furthest = std::max(furthest, static_cast<int>(limits[i]));
    const Ints last = Ints{} + (end - 1);
    limits = limits < last ? limits : last;
    Vector top, sum;
    std::memcpy(&top, partials.tops + g * kLanes, sizeof(top));
    std::memcpy(&sum, partials.sums + g * kLanes, sizeof(sum));
    for (int first = begin; first < std::min(end, furthest + 1); first += kTileSlots) {
      const int count = (std::min(kTileSlots, end - first) + kSubtile - 1) / kSubtile * kSubtile;
      const int64_t offset = (first - begin) * stride;
      fold_slots(keys + offset, key_size, values + offset, value_size, stride, first, count,
                 reinterpret_cast<const Vector*>(queries.values) + static_cast<size_t>(g) * key_size, limits,
                 queries.scale, &top, &sum, reinterpret_cast<Vector*>(partials.out) + static_cast<size_t>(g) * value_size);
    }
    std::memcpy(partials.tops + g * kLanes, &top, sizeof(top));
    std::memcpy(partials.sums + g * kLanes, &sum, sizeof(sum));
  }
}

// Decodes cached slots [begin, end) to latent and rotary part beside each other; zeros where there is no page, and up
// to the next multiple of `kSubtile` slots.
void read_slots(const LatentCache& cache, const int32_t* pages, int begin, int end, float* out) {
  const int width = cache.latent.size + cache.rope.size;
  const int padded = begin + (end - begin + kSubtile - 1) / kSubtile * kSubtile;
  for (int slot = begin; slot < padded; ++slot, out += width) {
    const int32_t page = slot < end ? pages[slot / cache.page_size] : -1;
    if (page < 0 || page >= cache.num_pages) {
      std::memset(out, 0, sizeof(float) * width);
      continue;
    }
    const int64_t place = static_cast<int64_t>(page) * cache.page_size + slot % cache.page_size;
    cache.latent.read(cache.latent, place, out);
    cache.rope.read(cache.rope, place, out + cache.latent.size);
  }
}

void attend_latents(const LatentCache& cache, const int32_t* pages, int begin, int end, const Queries& queries,
                    const Partials& partials) {
  const int rank = cache.latent.size, width = rank + cache.rope.size;
  thread_local std::vector<float> keys;
  keys.resize(static_cast<size_t>(kTileSlots) * width);
  for (int first = begin; first < end; first += kTileSlots) {
    const int last = std::min(end, first + kTileSlots);
    read_slots(cache, pages, first, last, keys.data());
    attend_tile(keys.data(), width, keys.data(), rank, width, first, last, queries, partials);
  }
}

}  // namespace MLA_ISA
