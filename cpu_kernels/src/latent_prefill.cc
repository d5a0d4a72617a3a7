// Attention to keys and values of each head, decompressed from the latents tile by tile.
#include <vector>

#include "attention_call.h"

namespace mla {

namespace {

constexpr int kExpandSlots = 128;  // slots that are decompressed at a time

// The latents of a sequence: rounded where there are kernels for that, or quantised where a weight asks for it; float
// weights have them decoded for each tile.
struct Latents {
  const LatentCache& cache;
  const int32_t* pages;
  int length;
  std::vector<Activations> quantised;  // a tile each
  std::vector<Lanes> rounded;          // of whole tiles

  void decode(const CachePart& part, int begin, int end, float* out, int64_t stride) const {
    kernels().read_slots(cache, part, pages, begin, end, out, stride);
  }

  void round(ffi::ThreadPool& pool) {
    const int64_t tiles = (length + kExpandSlots - 1) / kExpandSlots, width = rounded_lanes(cache.latent.size);
    rounded.resize(tiles * kExpandSlots * width);
    parallel_for(pool, tiles, [&](int64_t i) {
      const int begin = static_cast<int>(i) * kExpandSlots;
      kernels().round_latents(cache, pages, begin, std::min(begin + kExpandSlots, length), &rounded[begin * width]);
    });
  }

  void quantise(ffi::ThreadPool& pool) {
    quantised.resize((length + kExpandSlots - 1) / kExpandSlots);
    parallel_for(pool, static_cast<int64_t>(quantised.size()), [&](int64_t i) {
      const int begin = static_cast<int>(i) * kExpandSlots, count = std::min(kExpandSlots, length - begin);
      std::vector<float> rows(static_cast<size_t>(count) * cache.latent.size);
      decode(cache.latent, begin, begin + count, rows.data(), cache.latent.size);
      Activations& tile = quantised[i];
      tile.resize(count, cache.latent.size);
      tile.values = rows.data();
      for (int row = 0; row < count; ++row) kernels().quantise(&tile, row);
      tile.values = nullptr;
      Selection all{&tile, nullptr, count};
      arrange_here(true, &tile.tiles, &all);
    });
  }
};

// Decompresses tiles for one head: keys [slots, padded H + P] and values [slots, padded V] beside each other.
class Expansion {
 public:
  // `keys` [H, R] and `values` [V, R] are those of the head.
  Expansion(const Matrix& keys, const Matrix& values, int64_t key_size, int64_t value_size, const Latents& latents)
      : keys_(keys),
        values_(values),
        key_size_(key_size),
        value_size_(value_size),
        value_place_(padded(key_size + latents.cache.rope.size)),
        latents_(latents),
        memory_(kExpandSlots * stride() / kLanes) {}

  int64_t stride() const { return value_place_ + padded(value_size_); }
  float* keys() { return memory_[0].of; }
  float* values() { return keys() + value_place_; }

  void expand(int begin, int end) {
    const int count = end - begin;
    const Activations* quantised = latents_.quantised.empty() ? nullptr : &latents_.quantised[begin / kExpandSlots];
    if (keys_.format->is_float || values_.format->is_float) {
      decoded_.resize(static_cast<size_t>(count) * latents_.cache.latent.size);
      latents_.decode(latents_.cache.latent, begin, end, decoded_.data(), latents_.cache.latent.size);
      plain_.values = decoded_.data();
      plain_.size = latents_.cache.latent.size;
    }
    const auto multiply = [&](const Matrix& matrix, int64_t size, float* out) {
      const Activations* source = matrix.format->is_float ? &plain_ : quantised;
      const Selection rows{source, nullptr, count, source->tiles.data()};
      matrix.format->matmul(matrix, 0, size, rows, out, stride());
    };
    multiply(keys_, key_size_, keys());
    multiply(values_, value_size_, values());
    latents_.decode(latents_.cache.rope, begin, end, keys() + key_size_, stride());
  }

 private:
  Matrix keys_, values_;
  int64_t key_size_, value_size_, value_place_;
  const Latents& latents_;
  std::vector<Lanes> memory_;  // zeros, or what an earlier tile left, after the last slot
  std::vector<float> decoded_;
  Activations plain_;
};

struct PrefillCall : AttentionCall {
  Heads keys, values;
  const float *q, *q_rope;  // [batch, tokens, heads, key_size] and [..., the width of the cached rotary part]
  float* out;               // [batch, tokens, heads, value_size]
  int64_t heads, key_size, value_size;
  float scale;

  int64_t row(int64_t b, int64_t token, int64_t n) const { return (b * tokens + token) * heads + n; }

  // Queries [first, first + count) of head n of sequence b.
  void attend(const Latents& latents, int64_t b, int64_t n, int64_t first, int64_t count) const {
    const int64_t rope = cache.rope.size, width = key_size + rope;
    std::vector<Lanes> rows(count * padded(width) / kLanes);
    for (int64_t i = 0; i < count; ++i) {
      float* query = rows[i * padded(width) / kLanes].of;
      std::copy_n(q + row(b, first + i, n) * key_size, key_size, query);
      std::copy_n(q_rope + row(b, first + i, n) * rope, rope, query + key_size);
    }
    const int32_t* limits = positions + b * tokens + first;
    const Queries queries{rows[0].of, limits, static_cast<int>(count), scale};
    Found found;
    found.clear(count, value_size);
    const int64_t last = *std::max_element(limits, limits + count);
    const int end = static_cast<int>(std::min<int64_t>(latents.length, last + 1));
    if (latents.rounded.empty())
      attend_tiles(latents, n, end, queries, found.partials());
    else
      kernels().attend_head({cache, latents.pages, latents.rounded.data(), keys.of(n), values.of(n),
                             static_cast<int>(key_size), static_cast<int>(value_size), end},
                            queries, found.partials());
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < value_size; ++c)
        out[row(b, first + i, n) * value_size + c] = found.row(i)[c] / found.sums()[i];
  }

  void attend_tiles(const Latents& latents, int64_t n, int end, const Queries& queries,
                    const Partials& partials) const {
    Expansion expansion(keys.of(n), values.of(n), key_size, value_size, latents);
    for (int begin = 0; begin < end; begin += kExpandSlots) {
      const int stop = std::min(latents.length, begin + kExpandSlots);
      expansion.expand(begin, stop);
      kernels().attend_tile(expansion.keys(), static_cast<int>(key_size + cache.rope.size), expansion.values(),
                            static_cast<int>(value_size), expansion.stride(), begin, stop, queries, partials);
    }
  }

  // Whether there are kernels for latents that are rounded; whoever keeps float32 wants exactness.
  bool rounds() const {
    return kernels().attend_head != nullptr && keys.matrix.format->columns != nullptr &&
           values.matrix.format->columns != nullptr &&
           !cache.is_exact();
  }
};

// A head is a task; with fewer heads than threads would like, the queries are split as well.
void attend_all(ffi::ThreadPool& pool, const PrefillCall& call) {
  const int64_t parts = call.heads < 2 * pool.num_threads() ? std::min<int64_t>(4, (call.tokens + 127) / 128) : 1;
  const int64_t step = (call.tokens + parts - 1) / parts;
  for (int64_t b = 0; b < call.batch; ++b) {
    Latents latents{call.cache, call.pages + b * call.table, call.length(b), {}, {}};
    if (call.rounds())
      latents.round(pool);
    else if (!call.keys.matrix.format->is_float || !call.values.matrix.format->is_float)
      latents.quantise(pool);
    parallel_for(pool, call.heads * parts, [&](int64_t task) {
      const int64_t n = task % call.heads, first = task / call.heads * step;
      const int64_t count = std::min(step, call.tokens - first);
      if (count > 0) call.attend(latents, b, n, first, count);
    });
  }
}

// q [B, T, N, H], q_rope [B, T, N, P] -> [B, T, N, V]; keys of head n are the rows from n * key_stride on of the first
// weight, values those from n * value_stride + value_first on of the second.
ffi::Error latent_prefill(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> q_rope,
                          ffi::AnyBuffer key_blocks, ffi::AnyBuffer key_header, ffi::AnyBuffer value_blocks,
                          ffi::AnyBuffer value_header, ffi::Buffer<ffi::S32> pages, ffi::Buffer<ffi::S32> positions,
                          ffi::RemainingArgs parts, ffi::ResultBuffer<ffi::F32> out, std::string_view key_format,
                          std::string_view value_format, int64_t key_stride, int64_t value_stride, int64_t value_first,
                          std::string_view latent_type, std::string_view rope_type, float scale) {
  PrefillCall call;
  call.keys.stride = key_stride;
  call.keys.first = 0;
  call.values.stride = value_stride;
  call.values.first = value_first;
  Matrix &keys = call.keys.matrix, &values = call.values.matrix;
  if (ffi::Error error = read_matrix(key_blocks, key_header, key_format, &keys); error.failure()) return error;
  if (ffi::Error error = read_matrix(value_blocks, value_header, value_format, &values); error.failure())
    return error;
  const Shape shape = q.dimensions(), rotated = q_rope.dimensions(), result = out->dimensions();
  if (shape.size() != 4 || rotated.size() != 4 || !equal(rotated, {shape[0], shape[1], shape[2], rotated[3]}))
    return ffi::Error::InvalidArgument("the rotated parts do not fit the queries");
  const int64_t rope = rotated[3];
  if (ffi::Error error = read_call(parts, shape, pages, positions, latent_type, rope_type, keys.size, rope, &call);
      error.failure())
    return error;
  if (result.size() != 4) return ffi::Error::InvalidArgument("the result must have four axes");
  call.q = q.typed_data();
  call.q_rope = q_rope.typed_data();
  call.out = out->typed_data();
  call.heads = shape[2];
  call.key_size = shape[3];
  call.value_size = result[3];
  call.scale = scale;
  if (!equal(result, {call.batch, call.tokens, call.heads, call.value_size}))
    return ffi::Error::InvalidArgument("the result does not fit the queries");
  if (out->element_count() == 0) return ffi::Error::Success();
  if (values.size != keys.size || !call.keys.hold(call.heads, call.key_size) ||
      !call.values.hold(call.heads, call.value_size))
    return ffi::Error::InvalidArgument("weights do not have rows for all heads");
  attend_all(pool, call);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_latent_prefill, latent_prefill,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("key_format")
                                  .Attr<std::string_view>("value_format")
                                  .Attr<int64_t>("key_stride")
                                  .Attr<int64_t>("value_stride")
                                  .Attr<int64_t>("value_first")
                                  .Attr<std::string_view>("latent_type")
                                  .Attr<std::string_view>("rope_type")
                                  .Attr<float>("scale"));

}  // namespace mla
