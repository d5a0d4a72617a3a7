// The FFN of selected experts: gate, up, their product, down, and the sum by weight, in one call.
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "operands.h"

namespace mla {

namespace {

// Pairs of a token and one of its experts, sorted by expert.
struct Pairs {
  std::vector<int32_t> begin;  // [experts + 1]
  std::vector<int32_t> token;  // [pairs]
  std::vector<int32_t> place;  // [tokens, K]: where a pair stands, -1 for one of no expert

  Pairs(const int32_t* ids, int64_t count, int64_t per_token, int64_t experts)
      : begin(experts + 1), token(count), place(count, -1) {
    for (int64_t i = 0; i < count; ++i)
      if (ids[i] >= 0 && ids[i] < experts) ++begin[ids[i] + 1];
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int32_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      if (ids[i] >= 0 && ids[i] < experts) {
        place[i] = next[ids[i]]++;
        token[place[i]] = static_cast<int32_t>(i / per_token);
      }
  }
  int32_t size() const { return begin.back(); }
};

// The rows of activations that each expert meets: of pair p, row `index[p]` of `source`.
class Selections {
 public:
  Selections(ffi::ThreadPool& pool, const Pairs& pairs, Activations* source, const int32_t* index, bool quantised)
      : pairs_(pairs), source_(source), index_(index), first_tile_(pairs.begin.size()) {
    for (size_t e = 0; e + 1 < first_tile_.size(); ++e) {
      const Selection rows{source, nullptr, pairs.begin[e + 1] - pairs.begin[e]};
      first_tile_[e + 1] = first_tile_[e] + (needs_tiles(rows, quantised) ? rows.num_tiles() : 0);
    }
    hold(first_tile_.back() * source->chunks(), &source->tiles);
    parallel_for(pool, first_tile_.back(), [&](int64_t tile) {
      const auto next = std::upper_bound(first_tile_.begin(), first_tile_.end(), tile);
      const auto e = static_cast<int32_t>(next - first_tile_.begin() - 1);
      kernels().arrange(of(e), tile - first_tile_[e], source->tiles.data() + tile * source->chunks());
    });
  }

  Selection of(int32_t e) const {
    const int32_t first = pairs_.begin[e];
    const ActivationTile* tiles = source_->tiles.data() + first_tile_[e] * source_->chunks();
    return {source_, index_ + first, pairs_.begin[e + 1] - first, tiles};
  }

 private:
  const Pairs& pairs_;
  const Activations* source_;
  const int32_t* index_;
  std::vector<int64_t> first_tile_;  // of each expert
};

// Rows [begin, end) of an expert.
struct ExpertRows {
  int32_t expert;
  int64_t begin, end;
};

// Calls f(rows, those that are likely to come next) for ranges of `rows` rows of every expert that has pairs.
template <class F>
void for_expert_rows(ffi::ThreadPool& pool, const Pairs& pairs, const Matrix& matrix, int64_t rows, const F& f) {
  std::vector<int32_t> used;
  for (size_t e = 0; e + 1 < pairs.begin.size(); ++e)
    if (pairs.begin[e + 1] > pairs.begin[e]) used.push_back(static_cast<int32_t>(e));
  Matrix part = matrix;
  part.rows = rows;
  const int64_t count = static_cast<int64_t>(used.size()), mean_pairs = pairs.size() / std::max<int64_t>(count, 1);
  const int64_t step = rows_per_task(part, count, mean_pairs, pool.num_threads()), tiles = (rows + step - 1) / step;
  parallel_for(pool, count * tiles, [&](int64_t task) {
    const auto of_task = [&](int64_t i) {
      const int64_t first = i % tiles * step;
      return ExpertRows{used[i / tiles], first, std::min(rows, first + step)};
    };
    f(of_task(task), of_task(std::min(task + pool.num_threads(), count * tiles - 1)));
  });
}

// x [X, D], ids and weights [X, K]; gate and up hold `hidden` rows per expert within `gate.rows`, up from row
// `up_first` on: of one matrix for both, or of two.
ffi::Error expert_ffn(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> ids,
                      ffi::Buffer<ffi::F32> weights, ffi::AnyBuffer gate_blocks, ffi::AnyBuffer gate_header,
                      ffi::AnyBuffer up_blocks, ffi::AnyBuffer up_header, ffi::AnyBuffer down_blocks,
                      ffi::AnyBuffer down_header, ffi::ResultBuffer<ffi::F32> out, std::string_view gate_format,
                      std::string_view up_format, std::string_view down_format, int64_t up_first) {
  Matrix gate, up, down;
  if (ffi::Error error = read_matrix(gate_blocks, gate_header, gate_format, &gate); error.failure()) return error;
  if (ffi::Error error = read_matrix(up_blocks, up_header, up_format, &up); error.failure()) return error;
  if (ffi::Error error = read_matrix(down_blocks, down_header, down_format, &down); error.failure()) return error;
  const int64_t tokens = x.dimensions()[0], size = x.dimensions()[1], per_token = ids.dimensions()[1];
  const int64_t experts = down_blocks.dimensions()[0], hidden = down.size;
  const auto of_experts = [&](const Matrix& matrix) {
    return matrix.end - matrix.blocks == experts * matrix.rows * matrix.row_bytes;
  };
  if (gate.size != size || up.size != size || down.rows != size || gate.rows < hidden || up.rows < up_first + hidden ||
      !of_experts(gate) || !of_experts(up) || !of_experts(down) || ids.dimensions()[0] != tokens ||
      weights.element_count() != ids.element_count())
    return ffi::Error::InvalidArgument("tokens, ids, weights and experts do not fit each other");
  if ((gate.in_panels && hidden % kPanelRows != 0) ||
      (up.in_panels && (hidden % kPanelRows != 0 || up_first % kPanelRows != 0)))
    return ffi::Error::InvalidArgument("gate and up must have whole panels");
  const Pairs pairs(ids.typed_data(), tokens * per_token, per_token, experts);
  const int64_t count = pairs.size();
  Activations &inputs = scratch(0), &middles = scratch(1);
  const bool is_quantised = !gate.format->is_float || !up.format->is_float;
  read_activations(pool, x.typed_data(), tokens, size, is_quantised, &inputs);
  const auto numbers = [](int64_t count) { return std::unique_ptr<float[]>(new float[count]); };  // not cleared
  const auto gated = numbers(count * hidden), raised = numbers(count * hidden), results = numbers(count * size);
  const Selections into(pool, pairs, &inputs, pairs.token.data(), is_quantised);
  for_expert_rows(pool, pairs, gate, hidden, [&](const ExpertRows& rows, const ExpertRows& next) {
    const int32_t e = rows.expert;
    const int64_t first = pairs.begin[e] * hidden;
    Matrix own_gate = gate.from_row(e * gate.rows), own_up = up.from_row(e * up.rows + up_first);
    own_gate.next = own_up.from_row(rows.begin).blocks;
    own_up.next = gate.from_row(next.expert * gate.rows + next.begin).blocks;
    gate.format->matmul(own_gate, rows.begin, rows.end, into.of(e), gated.get() + first, hidden);
    up.format->matmul(own_up, rows.begin, rows.end, into.of(e), raised.get() + first, hidden);
  });
  middles.values = raised.get();
  middles.resize(static_cast<int>(count), static_cast<int>(hidden));
  parallel_ranges(pool, count, step_of(kTaskNumbers, hidden), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      kernels().gate(gated.get() + p * hidden, raised.get() + p * hidden, hidden);
      if (!down.format->is_float) kernels().quantise(&middles, static_cast<int>(p));
    }
  });
  std::vector<int32_t> own(count);
  std::iota(own.begin(), own.end(), 0);
  const Selections out_of(pool, pairs, &middles, own.data(), !down.format->is_float);
  for_expert_rows(pool, pairs, down, size, [&](const ExpertRows& rows, const ExpertRows& next) {
    const int32_t e = rows.expert;
    Matrix own = down.from_row(e * down.rows);
    own.next = down.from_row(next.expert * down.rows + next.begin).blocks;
    down.format->matmul(own, rows.begin, rows.end, out_of.of(e), results.get() + pairs.begin[e] * size, size);
  });
  std::fill(out->typed_data(), out->typed_data() + tokens * size, 0.0f);
  parallel_ranges(pool, tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * per_token; i < end * per_token; ++i)
      if (pairs.place[i] >= 0)
        kernels().add(results.get() + pairs.place[i] * size, weights.typed_data()[i],
                      out->typed_data() + i / per_token * size, size);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_expert_ffn, expert_ffn,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("gate_format")
                                  .Attr<std::string_view>("up_format")
                                  .Attr<std::string_view>("down_format")
                                  .Attr<int64_t>("up_first"));

}  // namespace mla
