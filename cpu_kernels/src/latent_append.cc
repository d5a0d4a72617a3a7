// From the down-projection to the cache: norm of the latent, rotary position, Hadamard rotation, codes, and where they
// go.
#include <cmath>
#include <vector>

#include "attention_call.h"
#include "rope.h"

namespace mla {

namespace {

constexpr int64_t kTaskTokens = 4;

// Multiplies `size` numbers by the Hadamard matrix over sqrt(size).
void rotate(float* x, int size) {
  for (int distance = 1; distance < size; distance *= 2)
    for (int first = 0; first < size; first += 2 * distance)
      for (int i = first; i < first + distance; ++i) {
        const float upper = x[i], lower = x[i + distance];
        x[i] = upper + lower;
        x[i + distance] = upper - lower;
      }
  const float shrink = 1 / std::sqrt(static_cast<float>(size));
  for (int i = 0; i < size; ++i) x[i] *= shrink;
}

// A part of the cache that is written to.
struct Target {
  const CacheType* type;
  int size, run;  // numbers of a row, and of a run that is Hadamard-rotated, 0 for none
  CacheTarget planes;

  // Rotates a row where it is, and encodes it.
  void take(float* row, int64_t place) const {
    for (int first = 0; run > 0 && first < size; first += run) rotate(row + first, run);
    type->encode(row, size, place, planes);
  }
};

// Takes the arrays of a part from place `*next` on: as `read_part`, but none is there for what its type lacks.
ffi::Error read_target(const ffi::RemainingRets& pools, std::string_view name, int64_t size, int64_t run, int64_t slots,
                       size_t* next, Target* out) {
  const CacheType* type = kernels().cache_type(name);
  if (type == nullptr) return ffi::Error::InvalidArgument("there is no encoder of cache type " + std::string(name));
  if (run < 0 || (run & (run - 1)) != 0 || (run > 0 && size % run != 0))
    return ffi::Error::InvalidArgument("rows of " + std::to_string(size) + " numbers have no runs of " +
                                       std::to_string(run) + " to rotate");
  const auto bytes = type->row_bytes(size);
  void* planes[4] = {};
  bool fits = size % type->block == 0;
  for (int i = 0; fits && i < 4; ++i) {
    if (bytes[i] == 0) continue;
    auto found = pools.get<ffi::AnyBuffer>((*next)++);
    fits = found.has_value() && static_cast<int64_t>((*found)->size_bytes()) == slots * bytes[i];
    if (fits) planes[i] = (*found)->untyped_data();
  }
  if (!fits)
    return ffi::Error::InvalidArgument("arrays of the cache do not fit rows of " + std::to_string(size) +
                                       " numbers of type " + std::string(name));
  *out = {type, static_cast<int>(size), static_cast<int>(run), {planes[0], planes[1], planes[2], planes[3]}};
  return ffi::Error::Success();
}

// kv [B, T, R + P], norm [R], cos and sin [B, T, P / 2], and where the tokens go; into `pools`, which are the cache.
ffi::Error latent_append(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> kv, ffi::Buffer<ffi::F32> norm,
                         ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin, ffi::Buffer<ffi::S32> pages,
                         ffi::Buffer<ffi::S32> slots, ffi::RemainingArgs, ffi::RemainingRets pools,
                         std::string_view latent_type, std::string_view rope_type, int64_t latent_rotation,
                         int64_t rope_rotation, float epsilon) {
  const Shape shape = kv.dimensions(), table = pages.dimensions();
  auto first = pools.get<ffi::AnyBuffer>(0);
  if (shape.size() != 3 || !first.has_value() || (*first)->dimensions().size() != 3)
    return ffi::Error::InvalidArgument("new rows and a part of the cache must have three axes");
  const int64_t batch = shape[0], tokens = shape[1], rank = norm.element_count(), rope = shape[2] - rank;
  if (rope < 0 || rope % 2 != 0 || !equal(cos.dimensions(), {batch, tokens, rope / 2}) ||
      !equal(sin.dimensions(), {batch, tokens, rope / 2}) || !equal(slots.dimensions(), {batch, tokens}) ||
      table.size() != 2 || table[0] != batch)
    return ffi::Error::InvalidArgument("norm, angles, slots and pages do not fit the new rows");
  const int64_t num_pages = (*first)->dimensions()[0], page_size = (*first)->dimensions()[1];
  Target targets[2];
  size_t next = 0;
  const int64_t places = num_pages * page_size;
  if (ffi::Error error = read_target(pools, latent_type, rank, latent_rotation, places, &next, &targets[0]);
      error.failure())
    return error;
  if (ffi::Error error = read_target(pools, rope_type, rope, rope_rotation, places, &next, &targets[1]);
      error.failure())
    return error;
  if (next != pools.size()) return ffi::Error::InvalidArgument("the cache has arrays that its types lack");
  parallel_ranges(pool, batch * tokens, kTaskTokens, [&](int64_t begin, int64_t end) {
    std::vector<float> row(rank + rope);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = slots.typed_data()[i];
      if (slot < 0 || slot >= table[1] * page_size) continue;
      const int64_t page = pages.typed_data()[i / tokens * table[1] + slot / page_size];
      if (page < 0 || page >= num_pages) continue;
      const float* raw = kv.typed_data() + i * shape[2];
      kernels().normalise(raw, norm.typed_data(), rank, epsilon, row.data());
      rotate_pairs(raw + rank, cos.typed_data() + i * (rope / 2), sin.typed_data() + i * (rope / 2), rope / 2,
                   row.data() + rank);
      const int64_t place = page * page_size + slot % page_size;
      targets[0].take(row.data(), place);
      targets[1].take(row.data() + rank, place);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_latent_append, latent_append,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("latent_type")
                                  .Attr<std::string_view>("rope_type")
                                  .Attr<int64_t>("latent_rotation")
                                  .Attr<int64_t>("rope_rotation")
                                  .Attr<float>("epsilon"));

}  // namespace mla
