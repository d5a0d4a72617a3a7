// What AVX-512 with products of bfloat16 numbers adds to AVX-512.
#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

#include "attention.h"
#include "tiles_bf16.h"

namespace MLA_ISA {

// A register's pairs, a multiple of 64 bytes in memory.
struct alignas(64) Pairs {
  uint32_t of[kPairs];
};

// Queries and the latents of a tile, rounded.
struct Rounded {
  int key_pairs, value_size;
  std::vector<Pairs> queries, keys, values;

  void set_queries(const Queries& exact, int key_size, int rank) {
    key_pairs = (key_size + 2 * kPairs - 1) / (2 * kPairs) * kPairs;
    value_size = static_cast<int>(mla::padded(rank));
    queries.resize(static_cast<size_t>(exact.count) * key_pairs / kPairs);
    keys.resize(static_cast<size_t>(PairTile::kSlots) * key_pairs / kPairs);
    values.resize(keys.size());
    round_rows(exact.rows, exact.count, static_cast<int>(mla::padded(key_size)), queries[0].of);
  }
  PairTile tile() const { return {queries[0].of, keys[0].of, values[0].of, key_pairs, value_size}; }

  // Two slots at a time are decoded, so that what is not rounded stays in the nearest cache.
  void read(const LatentCache& cache, const int32_t* pages, int begin, int end, int length) {
    for_each_tile<2>(cache, pages, begin, end, length, [&](const float* rows, int width, int first, int) {
      uint32_t* key = keys[0].of + (first - begin) * key_pairs;
      uint32_t* value = values[0].of + (first - begin) * key_pairs;
      round_rows(rows, 2, width, key);
      for (int c = 0; c < key_pairs; c += kPairs) interleave(key + c, key + key_pairs + c, value + 2 * c);
    });
  }
};

void attend_rounded_latents(const LatentCache& cache, const int32_t* pages, int begin, int end, const Queries& queries,
                            const Partials& partials) {
  // Rounding a tile pays with many queries, and whoever keeps float32 wants exactness.
  if (queries.count < kManyQueries || cache.latent.type->name == std::string_view("f32"))
    return attend_latents(cache, pages, begin, end, queries, partials);
  thread_local Rounded rounded;
  rounded.set_queries(queries, cache.key_size(), cache.latent.size);
  for (int first = begin; first < end; first += PairTile::kSlots) {
    const int last = std::min(end, first + PairTile::kSlots);
    rounded.read(cache, pages, first, last, queries.length);
    fold_all(rounded.tile(), first, last, queries, partials);
  }
}

}  // namespace MLA_ISA
