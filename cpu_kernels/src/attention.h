// Attention of queries to tiles of keys and values: vectors lie along the rows of both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cache_rows.h"
#include "softmax.h"
#include "tiles_cache.h"
#include "tiles_float.h"

namespace MLA_ISA {

using mla::Partials;
using mla::Queries;

// Few queries take so little time that decoded slots must not leave the nearest cache; many read and write what they
// have found so far once a tile.
constexpr int kManyQueries = 9, kFewSlots = 16, kManySlots = 64;

// Folds slots [begin, end) into the state of kQueries queries from the `q`-th on. One that sees nothing of some slots
// does not meet them: a value that is no number would spoil it, whatever its weight.
template <int kQueries, class Tile>
void fold(const Tile& tile, int begin, int end, const Queries& queries, int q, const Partials& partials) {
  const int32_t* positions = queries.positions + q;
  end = std::min(end, *std::max_element(positions, positions + kQueries) + 1);
  for (int first = begin; first < end; first += Tile::kSlots) {
    if constexpr (kQueries > 1)
      if (*std::min_element(positions, positions + kQueries) < first) {
        for (int i = 0; i < kQueries; ++i) fold<1>(tile.from(0, first - begin), first, end, queries, q + i, partials);
        return;
      }
    const Tile part = tile.from(q, first - begin);
    const int count = std::min(Tile::kSlots, end - first);
    alignas(64) float scores[kQueries][Tile::kSlots] = {};
    float shrink[kQueries];
    score<kQueries>(part, count, scores);
    for (int i = 0; i < kQueries; ++i)
      shrink[i] = weigh(first, static_cast<int>(mla::padded(count)), std::min(positions[i], end - 1), queries.scale,
                        Tile::round, scores[i], partials.tops + q + i, partials.sums + q + i);
    add_values<kQueries>(part, count, scores, shrink, partials.out + static_cast<int64_t>(q) * tile.value_size);
  }
}

template <class Tile>
void fold_all(const Tile& tile, int begin, int end, const Queries& queries, const Partials& partials) {
  int q = 0;
  for (; q + 4 <= queries.count; q += 4) fold<4>(tile, begin, end, queries, q, partials);
  for (; q + 2 <= queries.count; q += 2) fold<2>(tile, begin, end, queries, q, partials);
  if (q < queries.count) fold<1>(tile, begin, end, queries, q, partials);
}

template <int kSlots>
void fold_floats(const float* keys, int key_size, const float* values, int value_size, int64_t stride, int begin,
                 int end, const Queries& queries, const Partials& partials) {
  const int key_width = static_cast<int>(mla::padded(key_size)), width = static_cast<int>(mla::padded(value_size));
  const FloatTile<kSlots> tile{queries.rows, keys, values, key_width, width, stride};
  fold_all(tile, begin, end, queries, partials);
}

void attend_tile(const float* keys, int key_size, const float* values, int value_size, int64_t stride, int begin,
                 int end, const Queries& queries, const Partials& partials) {
  fold_floats<kManySlots>(keys, key_size, values, value_size, stride, begin, end, queries, partials);
}

// Decodes slots [begin, end), kSlots at a time, latent and rotary part beside each other and zeros up to whole vectors,
// and folds them. What comes next, of all slots of the sequence, is asked for meanwhile.
template <int kSlots>
void fold_latents(const LatentCache& cache, const int32_t* pages, int begin, int end, const Queries& queries,
                  const Partials& partials) {
  constexpr int kAhead = 16;  // slots that are on their way while others are met
  const int key_size = cache.key_size(), width = static_cast<int>(mla::padded(key_size));
  thread_local std::vector<mla::Lanes> memory;
  memory.resize(kSlots * width / kLanes);
  float* rows = memory[0].of;
  for (int first = begin; first < end; first += kSlots) {
    const int last = std::min(end, first + kSlots);
    for (int slot = first; slot < last; ++slot) {
      if (slot + kAhead < std::max(end, queries.length)) prefetch_slot(cache, pages, slot + kAhead);
      float* row = rows + (slot - first) * width;
      read_slots(cache, cache.latent, pages, slot, slot + 1, row, width);
      read_slots(cache, cache.rope, pages, slot, slot + 1, row + cache.latent.size, width);
      std::fill(row + key_size, row + width, 0.0f);
    }
    fold_floats<kSlots>(rows, key_size, rows, cache.latent.size, width, first, last, queries, partials);
  }
}

// The same, of rows that are met as they lie in the cache.
template <class R>
void fold_cached(const LatentCache& cache, const int32_t* pages, int begin, int end, const Queries& queries,
                 const Partials& partials) {
  CachedTiles<R> tiles(cache, pages, begin, std::max(end, queries.length));
  for (int first = begin; first < end; first += CacheTile<R>::kSlots)
    fold_all(tiles.next(queries.rows), first, std::min(end, first + CacheTile<R>::kSlots), queries, partials);
}

// Returns how few queries attend: in most types rows are decoded first.
inline auto fold_few(const LatentCache& cache) {
  const auto both = [&](std::string_view name) {
    return name == cache.latent.type->name && name == cache.rope.type->name;
  };
  if (cache.latent.size % kLanes == 0 && cache.rope.size % kLanes == 0) {
    if (both("f16")) return fold_cached<FloatRows<F16>>;
    if (both("bf16")) return fold_cached<FloatRows<BF16>>;
    if (both("f32")) return fold_cached<FloatRows<F32>>;
    if (both("q8_0")) return fold_cached<ScaledRows>;
  }
  return fold_latents<kFewSlots>;
}

void attend_latents(const LatentCache& cache, const int32_t* pages, int begin, int end, const Queries& queries,
                    const Partials& partials) {
  // Of several tokens none must show in its result how many there are.
  const bool are_few = queries.of_one_token && queries.count < kManyQueries;
  const auto fold = are_few ? fold_few(cache) : fold_latents<kManySlots>;
  fold(cache, pages, begin, end, queries, partials);
}

}  // namespace MLA_ISA
