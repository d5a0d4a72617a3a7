// What both ways of attention share: the cache they read, and what was found so far.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "operands.h"

namespace mla {

// The cache, and which slots of it the queries of each sequence see.
struct AttentionCall {
  LatentCache cache;
  const int32_t* pages;      // [batch, table]
  const int32_t* positions;  // [batch, tokens]
  int64_t batch, tokens, table;

  // How many slots of sequence `b` its queries see at most.
  int length(int64_t b) const {
    int32_t last = -1;
    for (int64_t t = 0; t < tokens; ++t) last = std::max(last, positions[b * tokens + t]);
    return static_cast<int>(std::min({last + int64_t{1}, table * cache.page_size, int64_t{1} << 30}));
  }
};

using Shape = ffi::Span<const int64_t>;

inline bool equal(Shape shape, std::initializer_list<int64_t> expected) {
  return std::equal(shape.begin(), shape.end(), expected.begin(), expected.end());
}

// A part of the cache is four arrays, low, high, scale and offset, of which those that a type lacks are empty.
inline ffi::Error read_part(const ffi::AnyBuffer* arrays, std::string_view name, int64_t size, int64_t slots,
                            CachePart* out) {
  const CacheType* type = kernels().cache_type(name);
  if (type == nullptr) return ffi::Error::InvalidArgument("there is no reader of cache type " + std::string(name));
  const auto bytes = type->row_bytes(size);
  const void* planes[4];
  for (int i = 0; i < 4; ++i) {
    if (size % type->block || static_cast<int64_t>(arrays[i].size_bytes()) != slots * bytes[i])
      return ffi::Error::InvalidArgument("arrays of the cache do not fit rows of " + std::to_string(size) +
                                         " numbers of type " + std::string(name));
    planes[i] = bytes[i] == 0 ? nullptr : arrays[i].untyped_data();
  }
  *out = {type, static_cast<int>(size), planes[0], planes[1], planes[2], planes[3]};
  return ffi::Error::Success();
}

// Reads all that the two ways share; queries are [batch, tokens, heads, size].
inline ffi::Error read_call(const ffi::RemainingArgs& args, Shape q, const ffi::Buffer<ffi::S32>& pages,
                            const ffi::Buffer<ffi::S32>& positions, std::string_view latent_type,
                            std::string_view rope_type, int64_t rank, int64_t rope, AttentionCall* out) {
  std::vector<ffi::AnyBuffer> parts;
  parts.reserve(args.size());
  for (size_t i = 0; i < args.size(); ++i) parts.push_back(args.get<ffi::AnyBuffer>(i).value());
  if (parts.size() != 8) return ffi::Error::InvalidArgument("a cache has two parts of four arrays");
  const auto low = parts[0].dimensions();
  if (low.size() != 3 || parts[4].dimensions().size() != 3)
    return ffi::Error::InvalidArgument("a part of the cache must have three axes");
  if (q.size() != 4 || !equal(positions.dimensions(), {q[0], q[1]}))
    return ffi::Error::InvalidArgument("positions do not fit the queries");
  if (pages.dimensions().size() != 2 || pages.dimensions()[0] != q[0])
    return ffi::Error::InvalidArgument("pages do not fit the queries");
  const int64_t slots = low[0] * low[1];
  LatentCache& cache = out->cache;
  if (ffi::Error error = read_part(parts.data(), latent_type, rank, slots, &cache.latent); error.failure())
    return error;
  if (ffi::Error error = read_part(parts.data() + 4, rope_type, rope, slots, &cache.rope); error.failure())
    return error;
  cache.num_pages = static_cast<int>(low[0]);
  cache.page_size = static_cast<int>(low[1]);
  out->pages = pages.typed_data();
  out->positions = positions.typed_data();
  out->batch = q[0];
  out->tokens = q[1];
  out->table = pages.dimensions()[1];
  return ffi::Error::Success();
}

// What attention to some slots gives; nothing at first. No two share a line of the processor's caches: several threads
// write to several of them.
class Found {
 public:
  void clear(int64_t queries, int64_t value_size) {
    width_ = padded(value_size) / kLanes;
    values_ = queries * width_;
    numbers_ = padded(queries) / kLanes;
    memory_.assign(values_ + 2 * numbers_, {});
    std::fill_n(tops(), queries, kNothing);
  }

  float* row(int64_t i) { return memory_[i * width_].of; }
  float* tops() { return memory_[values_].of; }
  float* sums() { return memory_[values_ + numbers_].of; }
  Partials partials() { return {tops(), sums(), row(0)}; }

 private:
  int64_t width_ = 0, values_ = 0, numbers_ = 0;  // registers of a row, of all rows, and of a number for each query
  std::vector<Lanes> memory_;  // values, tops and sums
};

}  // namespace mla
