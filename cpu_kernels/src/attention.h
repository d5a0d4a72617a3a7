// Attention of queries to tiles of keys and values: vectors lie along the rows of both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cache_rows.h"
#include "registers_float.h"
#include "softmax.h"

namespace MLA_ISA {

using mla::Partials;
using mla::Queries;

constexpr int kTileSlots = 32;

// Keys and values of `count` slots from `first` on, a multiple of 16 and at most `kTileSlots`. Sizes are padded, and
// rows `stride` apart.
struct Tile {
  const float* keys;
  const float* values;
  int key_size, value_size;
  int64_t stride;
  int first, count;
};

// kQueries queries meet as many slots at a time as there are registers for: each key is loaded once for all of them.
template <int kQueries>
void score(const Tile& tile, const float* queries, float (*scores)[kTileSlots]) {
  constexpr int kSlots = kWidth / kQueries;
  const int64_t stride = tile.stride;
  const int size = tile.key_size;
  for (int s = 0; s < tile.count; s += kSlots) {
    Part sums[kWidth] = {};
    const float* keys = tile.keys + s * stride;
    for (int c = 0; c < size; c += kWidth) {
      Part key[kSlots];
      for (int j = 0; j < kSlots; ++j) key[j] = load_part(keys + j * stride + c);
      for (int i = 0; i < kQueries; ++i) {
        const Part query = load_part(queries + i * size + c);
        for (int j = 0; j < kSlots; ++j) sums[i * kSlots + j] += query * key[j];
      }
    }
    float totals[kWidth];
    store_part(totals, add_across(sums));
    for (int i = 0; i < kQueries; ++i) std::memcpy(scores[i] + s, totals + i * kSlots, sizeof(float) * kSlots);
  }
}

// out = shrink * out + weights * values, in columns [begin, end).
template <int kQueries, int kParts>
void add_columns(const Tile& tile, const float (*weights)[kTileSlots], const float* shrink, int begin, int end,
                 float* out) {
  const int64_t stride = tile.stride;
  const int size = tile.value_size, count = tile.count;
  for (int c = begin; c < end; c += kParts * kWidth) {
    const float* values = tile.values + c;
    Part total[kQueries][kParts];
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kParts; ++j) total[i][j] = load_part(out + i * size + c + j * kWidth) * shrink[i];
    for (int s = 0; s < count; ++s) {
      Part value[kParts];
      for (int j = 0; j < kParts; ++j) value[j] = load_part(values + s * stride + j * kWidth);
      for (int i = 0; i < kQueries; ++i)
        for (int j = 0; j < kParts; ++j) total[i][j] += value[j] * weights[i][s];
    }
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kParts; ++j) store_part(out + i * size + c + j * kWidth, total[i][j]);
  }
}

template <int kQueries>
void add_values(const Tile& tile, const float (*weights)[kTileSlots], const float* shrink, float* out) {
  constexpr int kParts = kWidth / kQueries;
  const int whole = tile.value_size / (kParts * kWidth) * (kParts * kWidth);
  add_columns<kQueries, kParts>(tile, weights, shrink, 0, whole, out);
  add_columns<kQueries, 1>(tile, weights, shrink, whole, tile.value_size, out);
}

// Folds slots [tile.first, end), a tile at a time, into the state of kQueries queries from the `q`-th on.
template <int kQueries>
void fold(Tile tile, int end, const Queries& queries, int q, const Partials& partials) {
  const int32_t* positions = queries.positions + q;
  end = std::min(end, *std::max_element(positions, positions + kQueries) + 1);
  while (tile.first < end) {
    tile.count = static_cast<int>(mla::padded(std::min(kTileSlots, end - tile.first)));
    alignas(64) float scores[kQueries][kTileSlots];
    float shrink[kQueries];
    score<kQueries>(tile, queries.rows + static_cast<int64_t>(q) * tile.key_size, scores);
    for (int i = 0; i < kQueries; ++i)
      shrink[i] = weigh(tile.first, tile.count, std::min(positions[i], end - 1), queries.scale, scores[i],
                        partials.tops + q + i, partials.sums + q + i);
    add_values<kQueries>(tile, scores, shrink, partials.out + static_cast<int64_t>(q) * tile.value_size);
    tile.first += kTileSlots;
    tile.keys += kTileSlots * tile.stride;
    tile.values += kTileSlots * tile.stride;
  }
}

void attend_tile(const float* keys, int key_size, const float* values, int value_size, int64_t stride, int begin,
                 int end, const Queries& queries, const Partials& partials) {
  const Tile tile{keys, values, static_cast<int>(mla::padded(key_size)), static_cast<int>(mla::padded(value_size)),
                  stride, begin, 0};
  int q = 0;
  for (; q + 4 <= queries.count; q += 4) fold<4>(tile, end, queries, q, partials);
  for (; q + 2 <= queries.count; q += 2) fold<2>(tile, end, queries, q, partials);
  if (q < queries.count) fold<1>(tile, end, queries, q, partials);
}

void attend_latents(const LatentCache& cache, const int32_t* pages, int begin, int end, const Queries& queries,
                    const Partials& partials) {
  const int rank = cache.latent.size, key_size = cache.key_size();
  const int64_t stride = mla::padded(key_size);
  thread_local std::vector<mla::Lanes> memory;
  memory.resize(kTileSlots * stride / kLanes);
  float* rows = memory[0].of;
  for (int first = begin; first < end; first += kTileSlots) {
    const int last = std::min(end, first + kTileSlots), count = last - first;
    read_slots(cache, cache.latent, pages, first, last, rows, stride);
    read_slots(cache, cache.rope, pages, first, last, rows + rank, stride);
    for (int i = 0; i < count; ++i) std::fill(rows + i * stride + key_size, rows + (i + 1) * stride, 0.0f);
    std::fill(rows + count * stride, rows + mla::padded(count) * stride, 0.0f);
    attend_tile(rows, key_size, rows, rank, stride, first, last, queries, partials);
  }
}

}  // namespace MLA_ISA
