// Tiles of cached rows as they lie in the cache: few queries meet them sooner than they could be decoded to memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cache_rows.h"
#include "registers_float.h"

namespace MLA_ISA {

// A part of a cached row: its codes, and their scales as floats where it has any.
struct CachedRow {
  const uint8_t* low;
  const float* scales;
};

// What a register holds of a row, from place `first` on.
template <class F>
struct FloatRows {
  static constexpr int kBytes = F::kBytes, kBlock = 0;  // of a number; numbers of a scale
  static Part load(const CachedRow& row, int first) { return F::load(row.low, first); }
};

struct ScaledRows {
  static constexpr int kBytes = 1, kBlock = 32;
  static Part load(const CachedRow& row, int first) {
    const float scale = row.scales[first / kBlock];
#if defined(__AVX512F__)
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.low + first));
    return (Part)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)) * scale;
#else
    Part numbers;
    for (int i = 0; i < kWidth; ++i) numbers[i] = static_cast<float>(static_cast<int8_t>(row.low[first + i]));
    return numbers * scale;
#endif
  }
};

template <class R>
struct CacheTile {
  static constexpr int kSlots = 32;  // as many as the nearest cache has room for

  const float* queries;      // [queries, key_size]
  const CachedRow* latents;  // [2 * kSlots], those of the next tile as well; zeros after the sequence
  const CachedRow* ropes;
  int key_size, value_size;

  CacheTile from(int q, int slot) const {
    CacheTile part = *this;
    part.queries += static_cast<int64_t>(q) * key_size;
    part.latents += slot;
    part.ropes += slot;
    return part;
  }
  Part value(int slot, int c) const { return R::load(latents[slot], c); }
  static Vector round(Vector weights) { return weights; }
};

// As with a `FloatTile`: kQueries queries meet as many slots at a time as there are registers for. For each line of a
// row one of the next tile is asked for: all at once would be more than can be on their way.
template <int kQueries, class R>
void score(const CacheTile<R>& tile, int count, float (*scores)[CacheTile<R>::kSlots]) {
  constexpr int kAtOnce = kWidth / kQueries, kLine = 64;
  for (int s = 0; s < count; s += kAtOnce) {
    Part sums[kWidth] = {};
    const auto meet = [&](const CachedRow* rows, int size, const float* queries) __attribute__((always_inline)) {
      for (int c = 0; c < size; c += kWidth) {
        if (c * R::kBytes % kLine == 0)
          for (int j = 0; j < kAtOnce; ++j) __builtin_prefetch(rows[j + CacheTile<R>::kSlots].low + c * R::kBytes);
        Part key[kAtOnce];
        for (int j = 0; j < kAtOnce; ++j) key[j] = R::load(rows[j], c);
        for (int i = 0; i < kQueries; ++i) {
          const Part query = load_part(queries + i * tile.key_size + c);
          for (int j = 0; j < kAtOnce; ++j) sums[i * kAtOnce + j] += query * key[j];
        }
      }
    };
    meet(tile.latents + s, tile.value_size, tile.queries);
    meet(tile.ropes + s, tile.key_size - tile.value_size, tile.queries + tile.value_size);
    float totals[kWidth];
    store_part(totals, add_across(sums));
    for (int i = 0; i < kQueries; ++i) std::memcpy(scores[i] + s, totals + i * kAtOnce, sizeof(float) * kAtOnce);
  }
}

// The slots of a sequence from `begin` on, some at a time.
template <class R>
class CachedTiles {
 public:
  CachedTiles(const LatentCache& cache, const int32_t* pages, int begin, int length)
      : cache_(cache), pages_(pages), next_(begin), length_(length) {
    thread_local std::vector<mla::Lanes> zeros;
    thread_local std::vector<float> scales;
    zeros.resize((std::max(cache.latent.size, cache.rope.size) + kLanes - 1) / kLanes);
    scales.resize(2 * kSlots * num_scales());
    zeros_ = reinterpret_cast<const uint8_t*>(zeros.data());
    scales_ = scales.data();
    find(0);
  }

  CacheTile<R> next(const float* queries) {
    std::copy_n(latents_ + kSlots, kSlots, latents_);
    std::copy_n(ropes_ + kSlots, kSlots, ropes_);
    which_ = 1 - which_;
    find(which_);
    return {queries, latents_, ropes_, cache_.key_size(), cache_.latent.size};
  }

 private:
  static constexpr int kSlots = CacheTile<R>::kSlots;

  int num_scales() const { return R::kBlock > 0 ? cache_.key_size() / std::max(R::kBlock, 1) : 0; }

  // Looks up the tile after those that were, with its scales in one half of the memory for them.
  void find(int half) {
    float* scales = scales_ + half * kSlots * num_scales();
    int64_t place = -1;
    for (int i = 0, left = 0; i < kSlots; ++i, ++next_, --left) {
      if (left == 0) {
        const int32_t page = next_ < length_ ? pages_[next_ / cache_.page_size] : -1;
        const int offset = next_ % cache_.page_size;
        left = std::min(cache_.page_size - offset, next_ < length_ ? length_ - next_ : kSlots);
        place = page < 0 || page >= cache_.num_pages ? -1 : static_cast<int64_t>(page) * cache_.page_size + offset;
      }
      latents_[kSlots + i] = row(cache_.latent, place, &scales);
      ropes_[kSlots + i] = row(cache_.rope, place, &scales);
      place += place >= 0;
    }
  }

  CachedRow row(const CachePart& part, int64_t place, float** scales) {
    const uint8_t* low = static_cast<const uint8_t*>(part.low) + place * part.size * R::kBytes;
    const CachedRow found{place < 0 ? zeros_ : low, *scales};
    if constexpr (R::kBlock > 0) {
      const int count = part.size / R::kBlock;
      if (place < 0)
        std::fill_n(*scales, count, 0.0f);
      else
        F16::widen(static_cast<const uint8_t*>(part.scale), place * count, count, *scales);
      *scales += count;
    }
    return found;
  }

  const LatentCache& cache_;
  const int32_t* pages_;
  int next_, length_, which_ = 0;
  CachedRow latents_[2 * kSlots], ropes_[2 * kSlots];
  const uint8_t* zeros_;
  float* scales_;
};

}  // namespace MLA_ISA
