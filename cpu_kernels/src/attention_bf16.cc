// What AVX-512 with products of bfloat16 numbers adds to AVX-512.
#include <cstdint>
#include <vector>

#include "rounded.h"

namespace MLA_ISA {

void attend_rounded_latents(const LatentCache& cache, const int32_t* pages, int begin, int end, const Queries& queries,
                            const Partials& partials) {
  if (!rounds(cache, queries)) return attend_latents(cache, pages, begin, end, queries, partials);
  thread_local RoundedSlots slots;
  thread_local std::vector<Pairs> rounded;
  slots.resize(PairTile::kSlots, cache.latent.size, cache.rope.size, cache.latent.size);
  rounded.resize(static_cast<size_t>(queries.count) * slots.key_pairs / kPairs);
  round_queries(queries.rows, queries.count, cache.latent.size, cache.rope.size, 1, rounded[0].of);
  const PairTile tile = {rounded[0].of,   slots.key(0), slots.value(0), slots.key_pairs, slots.value_pairs,
                         static_cast<int>(mla::padded(cache.latent.size))};
  for (int first = begin; first < end; first += PairTile::kSlots) {
    const int last = std::min(end, first + PairTile::kSlots);
    slots.read_latents(cache, pages, first, last);
    fold_all(tile, first, last, queries, partials);
  }
}

}  // namespace MLA_ISA
