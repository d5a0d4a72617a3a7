// Attention of queries to tiles of keys and values: vectors lie along the rows of both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cache_rows.h"
#include "softmax.h"
#include "tiles_float.h"

namespace MLA_ISA {

using mla::Partials;
using mla::Queries;

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
    const int count = static_cast<int>(mla::padded(std::min(Tile::kSlots, end - first)));
    alignas(64) float scores[kQueries][Tile::kSlots];
    float shrink[kQueries];
    score<kQueries>(part, count, scores);
    for (int i = 0; i < kQueries; ++i)
      shrink[i] = weigh(first, count, std::min(positions[i], end - 1), queries.scale, Tile::round, scores[i],
                        partials.tops + q + i, partials.sums + q + i);
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

void attend_tile(const float* keys, int key_size, const float* values, int value_size, int64_t stride, int begin,
                 int end, const Queries& queries, const Partials& partials) {
  const int key_width = static_cast<int>(mla::padded(key_size)), width = static_cast<int>(mla::padded(value_size));
  fold_all(FloatTile{queries.rows, keys, values, key_width, width, stride}, begin, end, queries, partials);
}

// Decodes slots [begin, end), kSlots at a time, latent and rotary part beside each other and zeros up to whole vectors.
// Calls take(rows, width, first, last) with them; after the last come zeros, up to 16 slots or kSlots if that is less.
template <int kSlots, class Take>
void for_each_tile(const LatentCache& cache, const int32_t* pages, int begin, int end, const Take& take) {
  const int key_size = cache.key_size(), width = static_cast<int>(mla::padded(key_size));
  thread_local std::vector<mla::Lanes> memory;
  memory.resize(kSlots * width / kLanes);
  float* rows = memory[0].of;
  for (int first = begin; first < end; first += kSlots) {
    const int last = std::min(end, first + kSlots), count = last - first;
    read_slots(cache, cache.latent, pages, first, last, rows, width);
    read_slots(cache, cache.rope, pages, first, last, rows + cache.latent.size, width);
    for (int i = 0; i < count; ++i) std::fill(rows + i * width + key_size, rows + (i + 1) * width, 0.0f);
    std::fill(rows + count * width, rows + std::min<int64_t>(kSlots, mla::padded(count)) * width, 0.0f);
    take(rows, width, first, last);
  }
}

void attend_latents(const LatentCache& cache, const int32_t* pages, int begin, int end, const Queries& queries,
                    const Partials& partials) {
  for_each_tile<FloatTile::kSlots>(cache, pages, begin, end, [&](const float* rows, int width, int first, int last) {
    attend_tile(rows, cache.key_size(), rows, cache.latent.size, width, first, last, queries, partials);
  });
}

}  // namespace MLA_ISA
