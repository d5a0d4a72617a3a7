// Absorbed attention: to the latents of the cache themselves.
#include <cmath>
#include <vector>

#include "attention_call.h"

namespace mla {

namespace {

constexpr int kSplitSlots = 128;  // twice as many slots of a sequence are more than one task, four times more than two
constexpr int64_t kSplitScores = 2048;  // with few queries more slots: they must pay for merging
constexpr int kMinQueries = 32, kMaxQueries = 256;  // of a task, where there are as many
constexpr int kMaxTasks = 32;  // of a sequence, where slots are split: each keeps what it found until all are merged
constexpr int kKeptRows = 4096;  // that tasks find: with no more a thread keeps its memory, 8 MB of a rank of 512

// Some queries of a sequence, and some of its slots.
struct Task {
  int64_t sequence, first, count;
  int begin, end;
};

// All that is to be done. The tasks of block `i` of queries are `tasks[first[i]]` to `tasks[first[i + 1] - 1]`.
struct Plan {
  int64_t queries, blocks;  // of a sequence
  bool is_split = false;    // whether slots of any are shared out
  std::vector<Task> tasks;
  std::vector<int64_t> first;

  // Results must depend neither on the number of threads, nor on other sequences, nor on which tokens come together. So
  // slots are split by the length of a sequence where one token comes, and are not where more come, whose queries are.
  Plan(const AttentionCall& call, int64_t queries)
      : queries(queries), blocks((queries + kMaxQueries - 1) / kMaxQueries), first(1, 0) {
    if (call.tokens > 1) blocks = std::max(blocks, std::min<int64_t>(kMaxTasks, queries / kMinQueries));
    for (int64_t b = 0; b < call.batch; ++b) {
      const int length = call.length(b), parts = call.tokens > 1 ? 1 : splits(length);
      const int step = std::max(1, (length + parts - 1) / parts);
      is_split = is_split || parts > 1;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t query = begin(block), count = begin(block + 1) - query;
        for (int begin = 0; begin < length; begin += step)
          tasks.push_back({b, query, count, begin, std::min(begin + step, length)});
        first.push_back(static_cast<int64_t>(tasks.size()));
      }
    }
  }

  // How many tasks attend to the slots of a sequence: an even number, for as many threads.
  int splits(int length) const {
    const int64_t slots = std::max<int64_t>(kSplitSlots, kSplitScores / queries);
    const int64_t wanted = length < 2 * kSplitSlots ? 1 : (length + 2 * slots - 1) / (2 * slots) * 2;
    return static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, kMaxTasks / blocks / 2 * 2)));
  }

  // The first query of a block, and the block of a query: all have as many, or one more.
  int64_t begin(int64_t block) const { return block * queries / blocks; }
  int64_t block_of(int64_t query) const { return ((query + 1) * blocks - 1) / queries; }
};

// What a call works in. A thread keeps that of a small one: to ask for it takes as long as to attend to a few slots.
struct Scratch {
  std::vector<Lanes> rows;
  std::vector<int32_t> limits;
  std::vector<Found> found;
};

// Merges what `count` parts, at most kMaxTasks, found about query `i`, with m the largest score of all: sum of
// exp(top - m) * out, over sum of exp(top - m) * sum.
void merge(Found* parts, int64_t count, int64_t i, int64_t size, float* out) {
  float top = kNothing, sum = 0, shares[kMaxTasks];
  for (int64_t j = 0; j < count; ++j) {
    const float part = parts[j].tops()[i];
    top = part > top || part != part ? part : top;
  }
  for (int64_t j = 0; j < count; ++j) {
    shares[j] = parts[j].tops()[i] == kNothing ? 0 : std::exp(parts[j].tops()[i] - top);
    sum += shares[j] * parts[j].sums()[i];
  }
  std::fill(out, out + size, 0 / sum);  // no number where all scores are minus infinity
  for (int64_t j = 0; j < count; ++j)
    if (parts[j].tops()[i] != kNothing) kernels().add(parts[j].row(i), shares[j] / sum, out, size);
}

// The work of a call: queries are joined with their rotated parts, attend, and what they found is merged.
struct Work {
  const AttentionCall& call;
  const Plan& plan;
  const float *q, *q_rope;
  int64_t heads, rank, rope;
  float scale;
  float* out;
  Scratch& memory;

  int64_t width() const { return padded(rank + rope) / kLanes; }  // registers of a joined query

  void run(ffi::ThreadPool& pool) {
    const int64_t all = call.batch * plan.queries;
    memory.rows.resize(all * width());
    memory.limits.resize(all);
    memory.found.resize(plan.tasks.size());
    if (!plan.is_split) {  // then no thread needs what another has done
      return parallel_for(pool, call.batch * plan.blocks, [&](int64_t place) {
        const int64_t before = place / plan.blocks * plan.queries, block = place % plan.blocks;
        const int64_t begin = before + plan.begin(block), end = before + plan.begin(block + 1);
        join(begin, end);
        for (int64_t i = plan.first[place]; i < plan.first[place + 1]; ++i) attend(i);
        merge_all(begin, end);
      });
    }
    constexpr int64_t kStep = 16;  // queries
    parallel_ranges(pool, all, kStep, [&](int64_t begin, int64_t end) { join(begin, end); });
    parallel_for(pool, static_cast<int64_t>(plan.tasks.size()), [&](int64_t i) { attend(i); });
    parallel_ranges(pool, all, kStep, [&](int64_t begin, int64_t end) { merge_all(begin, end); });
  }

 private:
  void join(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = memory.rows[i * width()].of;
      std::copy_n(q + i * rank, rank, row);
      std::copy_n(q_rope + i * rope, rope, row + rank);
      std::fill(row + rank + rope, row + width() * kLanes, 0.0f);
      memory.limits[i] = call.positions[i / heads];
    }
  }

  void attend(int64_t i) {
    const Task& task = plan.tasks[i];
    const int64_t first = task.sequence * plan.queries + task.first;
    memory.found[i].clear(task.count, rank);
    kernels().attend_latents(call.cache, call.pages + task.sequence * call.table, task.begin, task.end,
                             {memory.rows[first * width()].of, &memory.limits[first], static_cast<int>(task.count),
                              scale, call.tokens == 1, call.length(task.sequence)},
                             memory.found[i].partials());
  }

  void merge_all(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t query = i % plan.queries, block = plan.block_of(query);
      const int64_t place = i / plan.queries * plan.blocks + block, first = plan.first[place];
      merge(memory.found.data() + first, plan.first[place + 1] - first, query - plan.begin(block), rank,
            out + i * rank);
    }
  }
};

// q [B, T, N, R], q_rope [B, T, N, P] -> [B, T, N, R].
ffi::Error latent_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> q_rope,
                            ffi::Buffer<ffi::S32> pages, ffi::Buffer<ffi::S32> positions, ffi::RemainingArgs parts,
                            ffi::ResultBuffer<ffi::F32> out, std::string_view latent_type, std::string_view rope_type,
                            float scale) {
  const Shape shape = q.dimensions(), rotated = q_rope.dimensions();
  if (shape.size() != 4 || rotated.size() != 4)
    return ffi::Error::InvalidArgument("both parts of the queries must have four axes");
  const int64_t heads = shape[2], rank = shape[3], rope = rotated[3];
  if (!equal(rotated, {shape[0], shape[1], heads, rope}))
    return ffi::Error::InvalidArgument("the rotated parts do not fit the queries");
  if (!equal(out->dimensions(), {shape[0], shape[1], heads, rank}))
    return ffi::Error::InvalidArgument("the result does not fit the queries");
  AttentionCall call;
  if (ffi::Error error = read_call(parts, shape, pages, positions, latent_type, rope_type, rank, rope, &call);
      error.failure())
    return error;
  if (out->element_count() == 0) return ffi::Error::Success();
  const Plan plan(call, call.tokens * heads);
  thread_local Scratch kept;
  Scratch passing;
  int64_t found_rows = 0;
  for (const Task& task : plan.tasks) found_rows += task.count;
  Scratch& memory = found_rows <= kKeptRows ? kept : passing;
  Work{call, plan, q.typed_data(), q_rope.typed_data(), heads, rank, rope, scale, out->typed_data(), memory}.run(pool);
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

}  // namespace mla
