// The FFN of selected experts: gate, up, their product, down, and the sum by weight, in one call.
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

// Calls f(expert, first row, last row) for ranges of `rows` rows of every expert that has pairs.
template <class F>
void for_expert_rows(ffi::ThreadPool& pool, const Pairs& pairs, const Matrix& matrix, int64_t rows, const F& f) {
  std::vector<int32_t> used;
  for (size_t e = 0; e + 1 < pairs.begin.size(); ++e)
    if (pairs.begin[e + 1] > pairs.begin[e]) used.push_back(static_cast<int32_t>(e));
  Matrix part = matrix;
  part.rows = rows;
  const int64_t step = rows_per_task(part, static_cast<int64_t>(used.size()), pool.num_threads());
  const int64_t tiles = (rows + step - 1) / step;
  parallel_for(pool, static_cast<int64_t>(used.size()) * tiles, [&](int64_t task) {
    const int64_t first = task % tiles * step;
    f(used[task / tiles], first, std::min(rows, first + step));
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
  const auto all_rows = [](const ffi::AnyBuffer& blocks) { return blocks.dimensions()[0] * blocks.dimensions()[1]; };
  if (gate.size != size || up.size != size || down.rows != size || gate.rows < hidden || up.rows < up_first + hidden ||
      all_rows(gate_blocks) != experts * gate.rows || all_rows(up_blocks) != experts * up.rows ||
      ids.dimensions()[0] != tokens || weights.element_count() != ids.element_count())
    return ffi::Error::InvalidArgument("tokens, ids, weights and experts do not fit each other");
  const Pairs pairs(ids.typed_data(), tokens * per_token, per_token, experts);
  const int64_t count = pairs.size();
  Activations &inputs = scratch(0), &middles = scratch(1);
  read_activations(pool, x.typed_data(), tokens, size, !gate.format->is_float || !up.format->is_float, &inputs);
  std::vector<float> gated(count * hidden), raised(count * hidden), results(count * size);
  for_expert_rows(pool, pairs, gate, hidden, [&](int32_t e, int64_t begin, int64_t end) {
    const int32_t first = pairs.begin[e];
    const Selection rows{&inputs, pairs.token.data() + first, pairs.begin[e + 1] - first};
    gate.format->matmul(gate.from_row(e * gate.rows), begin, end, rows, gated.data() + first * hidden, hidden);
    up.format->matmul(up.from_row(e * up.rows + up_first), begin, end, rows, raised.data() + first * hidden, hidden);
  });
  middles.values = raised.data();
  middles.resize(static_cast<int>(count), static_cast<int>(hidden));
  constexpr int64_t kStep = 4;
  parallel_for(pool, (count + kStep - 1) / kStep, [&](int64_t task) {
    for (int64_t p = task * kStep; p < std::min(count, (task + 1) * kStep); ++p) {
      kernels().gate(gated.data() + p * hidden, raised.data() + p * hidden, hidden);
      if (!down.format->is_float) kernels().quantise(&middles, static_cast<int>(p));
    }
  });
  std::vector<int32_t> own(count);
  std::iota(own.begin(), own.end(), 0);
  for_expert_rows(pool, pairs, down, size, [&](int32_t e, int64_t begin, int64_t end) {
    const int32_t first = pairs.begin[e];
    const Selection rows{&middles, own.data() + first, pairs.begin[e + 1] - first};
    down.format->matmul(down.from_row(e * down.rows), begin, end, rows, results.data() + first * size, size);
  });
  std::fill(out->typed_data(), out->typed_data() + tokens * size, 0.0f);
  parallel_for(pool, (tokens + 15) / 16, [&](int64_t task) {
    for (int64_t i = task * 16 * per_token; i < std::min(tokens, (task + 1) * 16) * per_token; ++i)
      if (pairs.place[i] >= 0)
        kernels().add(results.data() + pairs.place[i] * size, weights.typed_data()[i],
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
