// Attention over the paged latent cache: absorbed, and with keys and values decompressed tile by tile.
#include <cmath>
#include <limits>
#include <vector>

#include "operands.h"

namespace mla {

namespace {

constexpr int kLanes = 16;
constexpr int kSplitSlots = 128;   // slots of a sequence that one task attends to at least
constexpr int kBlockGroups = 16;   // groups of queries of a task
constexpr int kMaxTasks = 64;      // that split a sequence further: each keeps what it found until all are merged
constexpr int kExpandSlots = 128;  // slots that are decompressed at a time
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Call {
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
ffi::Error read_part(const ffi::AnyBuffer* arrays, std::string_view type, int64_t size, CachePart* out) {
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

ffi::Error read_call(const ffi::RemainingArgs& args, const ffi::Buffer<ffi::S32>& pages,
                     const ffi::Buffer<ffi::S32>& positions, std::string_view latent_type, std::string_view rope_type,
                     int64_t rank, int64_t rope, Call* out) {
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

// 16 numbers side by side, one of each query of a group.
struct alignas(64) Lanes {
  float of[kLanes] = {};
};

// Queries i = 0 ... count - 1 in groups: `row(i, to)` puts down the values of one [width], 16 floats apart, and
// `position(i)` gives its position. The last group is filled with queries that see nothing.
struct Grouped {
  std::vector<Lanes> values;  // [groups, width]
  std::vector<int32_t> positions;
  int groups;

  template <class RowOf, class PositionOf>
  Grouped(int64_t count, int64_t width, const RowOf& row, const PositionOf& position)
      : values((count + kLanes - 1) / kLanes * width),
        positions((count + kLanes - 1) / kLanes * kLanes, -1),
        groups(static_cast<int>((count + kLanes - 1) / kLanes)) {
    for (int64_t i = 0; i < count; ++i) {
      positions[i] = position(i);
      row(i, values[i / kLanes * width].of + i % kLanes);
    }
  }
  Queries view(float scale) const { return {values[0].of, positions.data(), groups, scale}; }
};

// What attention to some slots gives; nothing at first.
struct State {
  std::vector<Lanes> tops, sums, out;  // [groups], [groups], [groups, width]

  State() = default;
  State(int64_t groups, int64_t width) : tops(groups), sums(groups), out(groups * width) {
    for (Lanes& lanes : tops) std::fill_n(lanes.of, kLanes, kNothing);
  }
  Partials partials() { return {tops[0].of, sums[0].of, out[0].of}; }
};

void copy_strided(const float* from, int64_t count, float* to) {
  for (int64_t c = 0; c < count; ++c) to[c * kLanes] = from[c];
}

// q [B, T, N, R], q_rope [B, T, N, P] -> [B, T, N, R].
ffi::Error latent_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> q_rope,
                            ffi::Buffer<ffi::S32> pages, ffi::Buffer<ffi::S32> positions, ffi::RemainingArgs parts,
                            ffi::ResultBuffer<ffi::F32> out, std::string_view latent_type, std::string_view rope_type,
                            float scale) {
  const int64_t heads = q.dimensions()[2], rank = q.dimensions()[3], rope = q_rope.dimensions()[3];
  Call call;
  if (ffi::Error error = read_call(parts, pages, positions, latent_type, rope_type, rank, rope, &call);
      error.failure())
    return error;
  const int64_t queries = call.tokens * heads;
  if (out->element_count() == 0) return ffi::Error::Success();
  std::vector<Grouped> grouped;
  const int64_t groups = (queries + kLanes - 1) / kLanes, blocks = (groups + kBlockGroups - 1) / kBlockGroups;
  struct Task {
    int64_t sequence;
    int first_group, groups, begin, end;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> first_task(call.batch * blocks + 1);
  for (int64_t b = 0; b < call.batch; ++b) {
    grouped.emplace_back(
        queries, rank + rope,
        [&](int64_t i, float* to) {
          copy_strided(q.typed_data() + (b * queries + i) * rank, rank, to);
          copy_strided(q_rope.typed_data() + (b * queries + i) * rope, rope, to + rank * kLanes);
        },
        [&](int64_t i) { return call.positions[b * call.tokens + i / heads]; });
    const int length = call.length(b), splits = static_cast<int>(std::max<int64_t>(1, kMaxTasks / (call.batch * blocks)));
    const int step = std::max(kSplitSlots, (length + splits - 1) / splits);
    for (int64_t block = 0; block < blocks; ++block) {
      const int first = static_cast<int>(block) * kBlockGroups;
      const int count = std::min(kBlockGroups, static_cast<int>(groups) - first);
      for (int begin = 0; begin < length; begin += step)
        tasks.push_back({b, first, count, begin, std::min(begin + step, length)});
      first_task[b * blocks + block + 1] = static_cast<int64_t>(tasks.size());
    }
  }
  std::vector<State> states(tasks.size());
  parallel_for(pool, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    states[i] = State(task.groups, rank);
    Queries part = grouped[task.sequence].view(scale);
    part.values += task.first_group * (rank + rope) * kLanes;
    part.positions += task.first_group * kLanes;
    part.groups = task.groups;
    kernels().attend_latents(call.cache, call.pages + task.sequence * call.table, task.begin, task.end, part,
                             states[i].partials());
  });
  // Merging, with m the largest score of all parts: sum of exp(top - m) * out, over sum of exp(top - m) * sum.
  parallel_for(pool, call.batch * groups, [&](int64_t task) {
    const int64_t b = task / groups, group = task % groups, g = group % kBlockGroups;
    const int64_t begin = first_task[b * blocks + group / kBlockGroups];
    const int64_t end = first_task[b * blocks + group / kBlockGroups + 1];
    for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, queries - group * kLanes); ++lane) {
      float* result = out->typed_data() + (b * queries + group * kLanes + lane) * rank;
      std::fill(result, result + rank, 0.0f);
      float top = kNothing, sum = 0;
      for (int64_t j = begin; j < end; ++j) {
        const float part = states[j].tops[g].of[lane];
        top = part > top || part != part ? part : top;
      }
      for (int64_t j = begin; j < end; ++j) {
        const State& part = states[j];
        if (part.tops[g].of[lane] == kNothing) continue;
        const float share = std::exp(part.tops[g].of[lane] - top);
        sum += share * part.sums[g].of[lane];
        for (int64_t c = 0; c < rank; ++c) result[c] += share * part.out[g * rank + c].of[lane];
      }
      for (int64_t c = 0; c < rank; ++c) result[c] /= sum;
    }
  });
  return ffi::Error::Success();
}

// Decompresses a tile for one head: keys [slots, H + P] and values [slots, V] beside each other.
struct Expansion {
  Matrix keys, values;  // of the head: [H, R] and [V, R]
  int64_t key_size, value_size, rope;

  int64_t stride() const { return key_size + rope + value_size; }

  // `latents` are those of the sequence, quantised if need be; `rows` the decoded cache rows.
  void operator()(const Selection& latents, const float* rows, int64_t rank, float* out) const {
    keys.format->matmul(keys, 0, key_size, latents, out, stride());
    values.format->matmul(values, 0, value_size, latents, out + key_size + rope, stride());
    for (int i = 0; i < latents.count; ++i)
      std::copy_n(rows + latents.row(i) * (rank + rope) + rank, rope, out + i * stride() + key_size);
  }
};

// q [B, T, N, H + P] -> [B, T, N, V]; keys of head n are the rows from n * key_stride on of the first weight, values
// those from n * value_stride + value_first on of the second.
ffi::Error latent_prefill(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer key_blocks,
                          ffi::AnyBuffer key_header, ffi::AnyBuffer value_blocks, ffi::AnyBuffer value_header,
                          ffi::Buffer<ffi::S32> pages, ffi::Buffer<ffi::S32> positions, ffi::RemainingArgs parts,
                          ffi::ResultBuffer<ffi::F32> out, std::string_view key_format, std::string_view value_format,
                          int64_t key_stride, int64_t value_stride, int64_t value_first, int64_t rope,
                          std::string_view latent_type, std::string_view rope_type, float scale) {
  Matrix keys, values;
  if (ffi::Error error = read_matrix(key_blocks, key_header, key_format, &keys); error.failure()) return error;
  if (ffi::Error error = read_matrix(value_blocks, value_header, value_format, &values); error.failure()) return error;
  const int64_t heads = q.dimensions()[2], width = q.dimensions()[3], value_size = out->dimensions()[3];
  const int64_t rank = keys.size;
  Call call;
  if (ffi::Error error = read_call(parts, pages, positions, latent_type, rope_type, rank, rope, &call);
      error.failure())
    return error;
  if (out->element_count() == 0) return ffi::Error::Success();
  for (int64_t b = 0; b < call.batch; ++b) {
    const int length = call.length(b);
    std::vector<float> rows((length + 8) * (rank + rope));
    parallel_for(pool, (length + kExpandSlots - 1) / kExpandSlots, [&](int64_t i) {
      const int begin = static_cast<int>(i) * kExpandSlots;
      kernels().read_slots(call.cache, call.pages + b * call.table, begin, std::min(length, begin + kExpandSlots),
                           rows.data() + begin * (rank + rope));
    });
    std::vector<float> latents(length * rank);
    for (int slot = 0; slot < length; ++slot)
      std::copy_n(rows.data() + slot * (rank + rope), rank, latents.data() + slot * rank);
    Activations& activations = scratch(0);
    read_activations(pool, latents.data(), length, rank, !keys.format->is_float || !values.format->is_float,
                     &activations);
    // A head is a task; with fewer heads than threads would like, the queries are split as well.
    const int64_t halves = heads < 2 * pool.num_threads() ? std::min<int64_t>(4, (call.tokens + 127) / 128) : 1;
    const int64_t step = (call.tokens + halves - 1) / halves;
    parallel_for(pool, heads * halves, [&](int64_t task) {
      const int64_t n = task % heads, first = task / heads * step, count = std::min(step, call.tokens - first);
      if (count <= 0) return;
      const Grouped queries(
          count, width,
          [&](int64_t i, float* to) {
            copy_strided(q.typed_data() + ((b * call.tokens + first + i) * heads + n) * width, width, to);
          },
          [&](int64_t i) { return call.positions[b * call.tokens + first + i]; });
      State state(queries.groups, value_size);
      const Expansion expand{keys.from_row(n * key_stride), values.from_row(n * value_stride + value_first),
                             width - rope, value_size, rope};
      std::vector<float> tile(kExpandSlots * expand.stride());
      const int end = std::min(length, *std::max_element(queries.positions.begin(), queries.positions.end()) + 1);
      for (int begin = 0; begin < end; begin += kExpandSlots) {
        int32_t slots[kExpandSlots];
        const int num_slots = std::min(kExpandSlots, end - begin);
        for (int i = 0; i < num_slots; ++i) slots[i] = begin + i;
        std::fill(tile.begin(), tile.end(), 0.0f);
        expand({&activations, slots, num_slots}, rows.data(), rank, tile.data());
        kernels().attend_tile(tile.data(), static_cast<int>(width), tile.data() + width, static_cast<int>(value_size),
                              expand.stride(), begin, begin + num_slots, queries.view(scale), state.partials());
      }
      for (int64_t i = 0; i < count; ++i) {
        float* result = out->typed_data() + ((b * call.tokens + first + i) * heads + n) * value_size;
        const int64_t g = i / kLanes, lane = i % kLanes;
        for (int64_t c = 0; c < value_size; ++c)
          result[c] = state.out[g * value_size + c].of[lane] / state.sums[g].of[lane];
      }
    });
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_latent_attention, latent_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("latent_type")
                                  .Attr<std::string_view>("rope_type")
                                  .Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_latent_prefill, latent_prefill,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
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
                                  .Attr<int64_t>("rope")
                                  .Attr<std::string_view>("latent_type")
                                  .Attr<std::string_view>("rope_type")
                                  .Attr<float>("scale"));

}  // namespace mla
