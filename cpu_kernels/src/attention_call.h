// What both ways of attention share: the cache they read, and what was found so far.
#pragma once

#include <algorithm>
#include <cstring>
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
    return static_cast<int>(std::min<int64_t>(last + int64_t{1}, table * cache.page_size));
  }
};

// A part of the cache is four arrays, low, high, scale and offset, of which those that a type lacks are empty.
inline ffi::Error read_part(const ffi::AnyBuffer* arrays, std::string_view type, int64_t size, CachePart* out) {
  out->read = kernels().cache_reader(type);
  if (out->read == nullptr) return ffi::Error::InvalidArgument("there is no reader of cache type " + std::string(type));
  const auto data = [&](int i) { return arrays[i].element_count() == 0 ? nullptr : arrays[i].untyped_data(); };
  out->size = static_cast<int>(size);
  out->low = data(0);
  out->high = data(1);
  out->scale = data(2);
  out->offset = data(3);
  return ffi::Error::Success();
}

inline ffi::Error read_call(const ffi::RemainingArgs& args, const ffi::Buffer<ffi::S32>& pages,
                            const ffi::Buffer<ffi::S32>& positions, std::string_view latent_type,
                            std::string_view rope_type, int64_t rank, int64_t rope, AttentionCall* out) {
  std::vector<ffi::AnyBuffer> parts;
  for (size_t i = 0; i < args.size(); ++i) parts.push_back(args.get<ffi::AnyBuffer>(i).value());
  if (parts.size() != 8) return ffi::Error::InvalidArgument("a cache has two parts of four arrays");
  if (ffi::Error error = read_part(parts.data(), latent_type, rank, &out->cache.latent); error.failure()) return error;
  if (ffi::Error error = read_part(parts.data() + 4, rope_type, rope, &out->cache.rope); error.failure()) return error;
  out->cache.num_pages = static_cast<int>(parts[0].dimensions()[0]);
  out->cache.page_size = static_cast<int>(parts[0].dimensions()[1]);
  out->pages = pages.typed_data();
  out->positions = positions.typed_data();
  out->batch = positions.dimensions()[0];
  out->tokens = positions.dimensions()[1];
  out->table = pages.dimensions()[1];
  return ffi::Error::Success();
}

// What attention to some slots gives; nothing at first.
struct Found {
  int64_t count = 0, width = 0;  // queries, and padded size of a value
  std::vector<Lanes> out;        // [count, width]
  std::vector<float> tops, sums;

  Found() = default;
  Found(int64_t count, int64_t value_size)
      : count(count), width(padded(value_size)), out(count * width / kLanes), tops(count, kNothing), sums(count) {}

  const float* row(int64_t i) const { return out[i * width / kLanes].of; }
  Partials partials() { return {tops.data(), sums.data(), out[0].of}; }
};

}  // namespace mla
