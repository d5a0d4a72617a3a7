// Tiles of keys and values in float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "registers_float.h"

namespace MLA_ISA {

// Queries, keys and values: rows of padded sizes, those of slots `stride` apart.
template <int kNumSlots>
struct FloatTile {
  static constexpr int kSlots = kNumSlots;

  const float* queries;
  const float* keys;
  const float* values;
  int key_size, value_size;
  int64_t stride;

  FloatTile from(int q, int slot) const {
    FloatTile part = *this;
    part.queries += static_cast<int64_t>(q) * key_size;
    part.keys += slot * stride;
    part.values += slot * stride;
    return part;
  }
  Part value(int slot, int c) const { return load_part(values + slot * stride + c); }
  static Vector round(Vector weights) { return weights; }
};

// kQueries queries meet as many slots at a time as there are registers for: each key is loaded once for all of them.
// Slots after `count` up to a multiple of 16 may be read; what their scores are then does not matter.
template <int kQueries, int kTile>
void score(const FloatTile<kTile>& tile, int count, float (*scores)[kTile]) {
  constexpr int kSlots = kWidth / kQueries;
  const int64_t stride = tile.stride;
  const int size = tile.key_size;
  for (int s = 0; s < count; s += kSlots) {
    Part sums[kWidth] = {};
    const float* keys = tile.keys + s * stride;
    for (int c = 0; c < size; c += kWidth) {
      Part key[kSlots];
      for (int j = 0; j < kSlots; ++j) key[j] = load_part(keys + j * stride + c);
      for (int i = 0; i < kQueries; ++i) {
        const Part query = load_part(tile.queries + i * size + c);
        for (int j = 0; j < kSlots; ++j) sums[i * kSlots + j] += query * key[j];
      }
    }
    float totals[kWidth];
    store_part(totals, add_across(sums));
    for (int i = 0; i < kQueries; ++i) std::memcpy(scores[i] + s, totals + i * kSlots, sizeof(float) * kSlots);
  }
}

// out = shrink * out + weights * values, in columns [begin, end) of a tile that gives a register of each value.
template <int kQueries, int kParts, class Tile>
void add_columns(const Tile& tile, int count, const float (*weights)[Tile::kSlots], const float* shrink, int begin,
                 int end, float* out) {
  const int size = tile.value_size;
  for (int c = begin; c < end; c += kParts * kWidth) {
    Part total[kQueries][kParts];
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kParts; ++j) total[i][j] = load_part(out + i * size + c + j * kWidth) * shrink[i];
    for (int s = 0; s < count; ++s) {
      Part value[kParts];
      for (int j = 0; j < kParts; ++j) value[j] = tile.value(s, c + j * kWidth);
      for (int i = 0; i < kQueries; ++i)
        for (int j = 0; j < kParts; ++j) total[i][j] += value[j] * weights[i][s];
    }
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kParts; ++j) store_part(out + i * size + c + j * kWidth, total[i][j]);
  }
}

template <int kQueries, class Tile>
void add_values(const Tile& tile, int count, const float (*weights)[Tile::kSlots], const float* shrink, float* out) {
  constexpr int kParts = kWidth / kQueries;
  const int whole = tile.value_size / (kParts * kWidth) * (kParts * kWidth);
  add_columns<kQueries, kParts>(tile, count, weights, shrink, 0, whole, out);
  add_columns<kQueries, 1>(tile, count, weights, shrink, whole, tile.value_size, out);
}

}  // namespace MLA_ISA
