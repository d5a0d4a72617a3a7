// Attention by products of tiles of bfloat16 numbers, 16 queries at a time.
//
// A product of two tiles multiplies pairs of bfloat16 numbers. Scores are keys [slots, pairs] times queries
// [pairs, 16], so that a query is a lane of what follows. Its weights are turned once more, to be
// [16, pairs of slots], and meet values [pairs of slots, 16 columns].
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rounded.h"
#include "tiles_amx.h"
#include "transpose512.h"

namespace MLA_ISA {

constexpr int kTileSlots = 64;  // whose weights are found at a time
constexpr int kKeptQueries = 512;  // of a prompt: with no more a thread keeps its memory
constexpr float kLog2E = 1.44269504f;

// 2 to the x, of numbers that are at most 0; nothing of minus infinity. Five terms of the series are more than enough
// for what is rounded to bfloat16.
inline Vector power_of_two(Vector x) {
  const __mmask16 is_there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kNothing), _CMP_NEQ_UQ);
  const auto whole = (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector rest = x - whole;
  const Vector of_rest = 1 + rest * (0.69314718f + rest * (0.24022651f + rest * (0.05550411f + rest * 0.00961813f)));
  return (Vector)_mm512_maskz_scalef_ps(is_there, (__m512)of_rest, (__m512)whole);
}

// 16 queries, or the last of them, and what they have found.
struct alignas(64) QueryBlock {
  float tops[kRows], sums[kRows];  // scores are logarithms to base 2
  int32_t limits[kRows];  // the last slot that each sees
  int count, first_limit, last_limit;
};

class TiledQueries {
 public:
  // Queries have `size` numbers and `rope` that are rotated; they see none of the slots from `end` on.
  void set(const Queries& queries, int size, int rope, int value_size, int end) {
    key_pairs_ = pairs_for(size) + pairs_for(rope);
    columns_ = static_cast<int>(mla::padded(value_size)) / kRows;
    blocks_.resize((queries.count + kRows - 1) / kRows);
    rounded_.resize(static_cast<size_t>(kRows) * key_pairs_ / kPairs);
    turned_.resize(blocks_.size() * key_pairs_);
    found_.assign(blocks_.size() * columns_ * kRows, {});
    const int64_t width = mla::padded(size + rope);
    for (size_t i = 0; i < blocks_.size(); ++i) {
      QueryBlock& block = blocks_[i];
      const int first = static_cast<int>(i) * kRows;
      block.count = std::min(queries.count - first, kRows);
      std::fill_n(block.tops, kRows, kNothing);
      std::fill_n(block.sums, kRows, 0.0f);
      std::fill_n(block.limits, kRows, -1);
      std::fill(block.tops + block.count, block.tops + kRows, 0.0f);  // or their shrinking would look like work
      std::fill(rounded_.begin() + block.count * key_pairs_ / kPairs, rounded_.end(), Pairs{});
      for (int q = 0; q < block.count; ++q) block.limits[q] = std::min(queries.positions[first + q], end - 1);
      block.first_limit = *std::min_element(block.limits, block.limits + block.count);
      block.last_limit = *std::max_element(block.limits, block.limits + block.count);
      round_queries(queries.rows + first * width, block.count, size, rope, queries.scale * kLog2E, rounded_[0].of);
      for (int c = 0; c < key_pairs_; c += kPairs)
        transpose_words(rounded_[0].of + c, 4 * key_pairs_, turned_[i * key_pairs_ + c].of);
    }
  }

  // Folds `count` slots from `first` on.
  void fold(RoundedSlots& slots, int first, int count) {
    for (size_t i = 0; i < blocks_.size(); ++i)
      for (int s = 0; s < std::min(count, blocks_[i].last_limit + 1 - first); s += kTileSlots)
        fold_block(i, slots, s, first + s, std::min({kTileSlots, count - s, blocks_[i].last_limit + 1 - first - s}));
  }

  void store(const Partials& partials) {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const QueryBlock& block = blocks_[i];
      for (int q = 0; q < block.count; ++q) partials.tops[i * kRows + q] = block.tops[q] / kLog2E;
      std::copy_n(block.sums, block.count, partials.sums + i * kRows);
      for (int q = 0; q < block.count; ++q)
        for (int c = 0; c < columns_; ++c)
          std::memcpy(partials.out + ((i * kRows + q) * columns_ + c) * kRows, found(i)[c][q], sizeof(float) * kRows);
    }
  }

 private:
  TileFloats* found(size_t block) { return reinterpret_cast<TileFloats*>(found_[block * columns_ * kRows].of); }

  void fold_block(size_t i, RoundedSlots& slots, int place, int first, int count) {
    QueryBlock& block = blocks_[i];
    alignas(64) TileFloats scores[kTileSlots / kRows];
    alignas(64) uint32_t weights[kTileSlots / 2][kRows], turned[kTileSlots / 2][kRows];
    const auto score = [&](auto blocks) {
      score_tiles<blocks>(slots.key(place), key_pairs_, turned_[i * key_pairs_].of, scores);
    };
    with_count<4>((count + kRows - 1) / kRows, score);
    rescale(found(i), weigh(block, first, count, scores[0], weights));
    transpose_words(weights, 64, turned);
    load_tile<6>(turned, 64);
    if (count > kTileSlots / 2) {
      transpose_words(weights[kRows], 64, turned[kRows]);
      load_tile<7>(turned[kRows], 64);
      add_values<2>(found(i), block, first, slots.value(place), slots.value_pairs);
    } else {
      add_values<1>(found(i), block, first, slots.value(place), slots.value_pairs);
    }
  }

  template <int most, class Use>
  static void with_count(int count, const Use& use) {
    if constexpr (most > 1)
      if (count < most) return with_count<most - 1>(count, use);
    use(std::integral_constant<int, most>());
  }

  // Turns the scores of `count` slots into weights, in pairs of slots up to a multiple of 32. Returns by what all that
  // was summed before shrinks.
  static Vector weigh(QueryBlock& block, int first, int count, float (*scores)[kRows], uint32_t (*weights)[kRows]) {
    auto& top = *reinterpret_cast<Vector*>(block.tops);
    auto& sum = *reinterpret_cast<Vector*>(block.sums);
    auto* const vectors = reinterpret_cast<Vector*>(scores);
    if (block.first_limit < first + count - 1) {
      const Ints limits = *reinterpret_cast<const Ints*>(block.limits);
      for (int s = 0; s < count; ++s) vectors[s] = Ints{} + (first + s) <= limits ? vectors[s] : spread(kNothing);
    }
    Vector best = top;  // where a score is no number its weight is none either
    for (int s = 0; s < count; ++s) best = (Vector)_mm512_max_ps((__m512)best, (__m512)vectors[s]);
    // A query that has seen nothing yet keeps its top at minus infinity: take 0 instead, all its weights are 0.
    const Vector base = best == spread(kNothing) ? Vector{} : best;
    Vector evens = {}, odds = {};
    const int whole = (count + 31) / 32 * 32;
    for (int s = 0; s < whole; s += 2) {
      const Vector even = s < count ? power_of_two(vectors[s] - base) : Vector{};
      const Vector odd = s + 1 < count ? power_of_two(vectors[s + 1] - base) : Vector{};
      const __m512i both = pair_up((__m512)even, (__m512)odd);
      evens += (Vector)_mm512_slli_epi32(both, 16);
      odds += (Vector)_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
      _mm512_store_si512(weights[s / 2], both);
    }
    const Vector shrink = power_of_two(top - base);
    sum = sum * shrink + (evens + odds);
    top = best;
    return shrink;
  }

  void rescale(TileFloats* found, Vector shrink) const {
    if (_mm512_cmp_ps_mask((__m512)shrink, _mm512_set1_ps(1), _CMP_EQ_OQ) == 0xFFFF) return;
    for (int c = 0; c < columns_; ++c)
      for (int q = 0; q < kRows; ++q) *reinterpret_cast<Vector*>(found[c][q]) *= shrink[q];
  }

  // Adds the values of kHalves times 32 slots. Queries have weights of 0 for what they do not see, but what is no
  // number would spoil them: then each meets by itself what it sees.
  template <int kHalves>
  void add_values(TileFloats* found, const QueryBlock& block, int first, const uint32_t* values, int value_pairs) {
    constexpr int kSlots = kHalves * kTileSlots / 2;
    if (block.first_limit >= first + kSlots - 1 || all_finite(values, kSlots * value_pairs))
      return add_columns<kHalves>(values, value_pairs, found, found);
    std::vector<Pairs> seen(kSlots * value_pairs / kPairs);
    std::vector<mla::Lanes> sums(columns_ * kRows);
    auto* const tiles = reinterpret_cast<TileFloats*>(sums[0].of);
    for (int q = 0; q < block.count; ++q) {
      const int count = std::min(block.limits[q] + 1 - first, kSlots);
      if (count <= 0) continue;
      std::fill(seen.begin(), seen.end(), Pairs{});
      std::copy_n(values, (count + 1) / 2 * 2 * value_pairs, seen[0].of);
      if (count % 2)
        for (int i = 0; i < 2 * value_pairs; ++i) seen[0].of[(count - 1) * value_pairs + i] &= 0xFFFF;
      add_columns<kHalves>(seen[0].of, value_pairs, found, tiles);
      for (int c = 0; c < columns_; ++c) std::memcpy(found[c][q], tiles[c][q], sizeof(found[c][q]));
    }
  }

  static bool all_finite(const uint32_t* words, int count) {
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    __mmask32 others = 0;
    for (int i = 0; i < count; i += kPairs)
      others |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(load_pairs(words + i), exponent), exponent);
    return others == 0;
  }

  // out = sums + weights times values.
  template <int kHalves>
  void add_columns(const uint32_t* values, int value_pairs, const TileFloats* sums, TileFloats* out) const {
    int c = 0;
    for (; c + 4 <= columns_; c += 4) add_tiles<4, kHalves>(values + c * kRows, value_pairs, sums + c, out + c);
    for (; c < columns_; ++c) add_tiles<1, kHalves>(values + c * kRows, value_pairs, sums + c, out + c);
  }

  int key_pairs_, columns_;  // pairs of a key, and registers of a value
  std::vector<QueryBlock> blocks_;
  std::vector<Pairs> rounded_, turned_;  // [16, key_pairs], and of each block [key_pairs, 16]
  std::vector<mla::Lanes> found_;        // of each block [columns, 16]
};

void attend_tiled_latents(const LatentCache& cache, const int32_t* pages, int begin, int end, const Queries& queries,
                          const Partials& partials) {
  if (!rounds(cache, queries)) return attend_latents(cache, pages, begin, end, queries, partials);
  const TileRegisters registers;
  thread_local RoundedSlots slots;
  thread_local TiledQueries tiled;
  slots.resize(kTileSlots, cache.latent.size, cache.rope.size, cache.latent.size);
  tiled.set(queries, cache.latent.size, cache.rope.size, cache.latent.size, end);
  for (int first = begin; first < end; first += kTileSlots) {
    const int last = std::min(end, first + kTileSlots);
    slots.read_latents(cache, pages, first, last);
    slots.clear_values(last - first, kTileSlots / 2);
    tiled.fold(slots, first, last - first);
  }
  tiled.store(partials);
}

// In tiles: [blocks of 16 slots, registers of a row, 16].
void round_latents(const LatentCache& cache, const int32_t* pages, int begin, int end, mla::Lanes* out) {
  const RoundRow round = rounding_of(cache.latent);
  const int64_t width = mla::rounded_lanes(cache.latent.size);
  thread_local std::vector<mla::Lanes> row;
  row.resize(width);
  for (int i = 0; i < end - begin; ++i) {
    const int64_t place = place_of(cache, pages, begin + i);
    round_place(round, cache.latent, place, reinterpret_cast<uint32_t*>(row[0].of));
    for (int64_t c = 0; c < width; ++c) out[(i / kRows * width + c) * kRows + i % kRows] = row[c];
  }
}

// A weight of a head in pairs of columns: [blocks of 16 rows, pairs, 16].
class TiledWeight {
 public:
  void read(const Matrix& matrix, int rows) {
    pairs_ = pairs_for(static_cast<int>(matrix.size));
    const int blocks = (rows + kRows - 1) / kRows;
    words_.resize(static_cast<size_t>(blocks) * pairs_);
    alignas(64) float columns[kChunk][kRows];
    for (int block = 0; block < blocks; ++block)
      for (int first = 0; first < pairs_; first += kChunk / 2) {
        const int row = block * kRows;
        matrix.format->columns(matrix, row, std::min(kRows, rows - row), first * 2 / kChunk, columns);
        for (int i = 0; i < std::min(kChunk / 2, pairs_ - first); ++i) {
          const __m512 even = _mm512_load_ps(columns[2 * i]), odd = _mm512_load_ps(columns[2 * i + 1]);
          _mm512_store_si512(words_[block * pairs_ + first + i].of, pair_up(even, odd));
        }
      }
  }

  int pairs() const { return pairs_; }
  const Pairs* block(int i) const { return &words_[std::min(i * pairs_, static_cast<int>(words_.size()) - pairs_)]; }

 private:
  int pairs_;
  std::vector<Pairs> words_;
};

// Keys and values of a head, a tile of slots at a time.
class ExpandedHead {
 public:
  explicit ExpandedHead(const mla::HeadSlots& source) : source_(source) {
    keys_.read(source.keys, source.key_size);
    values_.read(source.values, source.value_size);
  }

  void expand(int begin, int end, RoundedSlots* out) const {
    alignas(64) TileFloats tiles[2][2];
    for (int block = 0; block * kRows < source_.key_size; block += 2)
      for (int slot = 0; slot < end - begin; slot += 2 * kRows) {
        expand_blocks(begin + slot, keys_, block, tiles);
        for (int s = 0; s < 2 * kRows; ++s) {
          const auto& both = tiles[s / kRows];
          const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(both[1][s % kRows]),
                                                             _mm512_load_ps(both[0][s % kRows]));
          _mm512_storeu_si512(out->key(slot + s) + block * kRows / 2, words);
        }
      }
    const RoundRow round = rounding_of(source_.cache.rope);
    for (int slot = begin; slot < end; ++slot) {
      const int64_t place = place_of(source_.cache, source_.pages, slot);
      round_place(round, source_.cache.rope, place, out->key(slot - begin) + pairs_for(source_.key_size));
    }
    for (int block = 0; block * kRows < source_.value_size; block += 2)
      for (int slot = 0; slot < end - begin; slot += 2 * kRows) {
        expand_blocks(begin + slot, values_, block, tiles);
        for (int s = 0; s < 2 * kRows; s += 2)
          for (int j = 0; j < 2; ++j) {
            const auto& rows = tiles[s / kRows][j];
            _mm512_storeu_si512(out->value(slot + s) + (block + j) * kRows,
                                pair_up(_mm512_load_ps(rows[s % kRows]), _mm512_load_ps(rows[s % kRows + 1])));
          }
      }
  }

 private:
  // The products of 32 slots with two blocks of a weight.
  void expand_blocks(int slot, const TiledWeight& weight, int block, TileFloats (*out)[2]) const {
    const void* const weights[] = {weight.block(block), weight.block(block + 1)};
    const mla::Lanes* latents = source_.latents + slot * mla::rounded_lanes(source_.cache.latent.size);
    expand_tiles(latents, weights, weight.pairs(), out);
  }

  const mla::HeadSlots& source_;
  TiledWeight keys_, values_;
};

void attend_tiled_head(const mla::HeadSlots& source, const Queries& queries, const Partials& partials) {
  constexpr int kSlots = 128;  // that are decompressed at a time
  const TileRegisters registers;
  thread_local RoundedSlots slots;
  slots.resize(kSlots, source.key_size, source.cache.rope.size, source.value_size);
  thread_local TiledQueries kept;
  TiledQueries passing;
  TiledQueries& tiled = queries.count <= kKeptQueries ? kept : passing;
  tiled.set(queries, source.key_size, source.cache.rope.size, source.value_size, source.end);
  const ExpandedHead head(source);
  for (int first = 0; first < source.end; first += kSlots) {
    const int count = std::min(kSlots, source.end - first);
    head.expand(first, first + count, &slots);
    tiled.fold(slots, first, count);
  }
  tiled.store(partials);
}

}  // namespace MLA_ISA
