// Products of activations with a weight matrix, or with a matrix per head.
#include <vector>

#include "operands.h"

namespace mla {

namespace {

// x [..., size] and weight [rows, size] -> [..., rows].
ffi::Error matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer blocks, ffi::AnyBuffer header,
                  ffi::ResultBuffer<ffi::F32> out, std::string_view format) {
  Matrix matrix;
  if (ffi::Error error = read_matrix(blocks, header, format, &matrix); error.failure()) return error;
  if (x.dimensions().back() != matrix.size) return ffi::Error::InvalidArgument("x does not fit the weight");
  const int64_t rows = matrix.rows == 0 ? 0 : out->element_count() / matrix.rows;
  Activations& activations = scratch(0);
  read_activations(pool, x.typed_data(), rows, matrix.size, !matrix.format->is_float, &activations);
  Selection all{&activations, nullptr, static_cast<int>(rows)};
  arrange(pool, &activations, !matrix.format->is_float, &all);
  const int64_t step = rows_per_task(matrix, 1, rows, pool.num_threads());
  parallel_ranges(pool, rows == 0 ? 0 : matrix.rows, step, [&](int64_t begin, int64_t end) {
    matrix.format->matmul(matrix, begin, end, all, out->typed_data(), matrix.rows);
  });
  return ffi::Error::Success();
}

// x [X, N, size] and for each head `out` rows of the weight, from row n * stride + first on -> [X, N, out].
ffi::Error head_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer blocks, ffi::AnyBuffer header,
                       ffi::ResultBuffer<ffi::F32> out, std::string_view format, int64_t stride, int64_t first) {
  Heads weight{{}, stride, first};
  if (ffi::Error error = read_matrix(blocks, header, format, &weight.matrix); error.failure()) return error;
  const Matrix& matrix = weight.matrix;
  const int64_t tokens = x.dimensions()[0], heads = x.dimensions()[1], width = out->dimensions()[2];
  if (x.dimensions()[2] != matrix.size || !weight.hold(heads, width))
    return ffi::Error::InvalidArgument("x, the weight and its heads do not fit each other");
  Activations& activations = scratch(0);
  read_activations(pool, x.typed_data(), tokens * heads, matrix.size, !matrix.format->is_float, &activations);
  parallel_for(pool, tokens == 0 ? 0 : heads, [&](int64_t n) {
    std::vector<int32_t> rows(tokens);
    for (int64_t t = 0; t < tokens; ++t) rows[t] = static_cast<int32_t>(t * heads + n);
    Selection all{&activations, rows.data(), static_cast<int>(tokens)};
    thread_local std::vector<ActivationTile> tiles;
    arrange_here(!matrix.format->is_float, &tiles, &all);
    Matrix own = weight.of(n);
    own.next = weight.of(std::min(n + pool.num_threads(), heads - 1)).blocks;
    matrix.format->matmul(own, 0, width, all, out->typed_data() + n * width, heads * width);
  });
  return ffi::Error::Success();
}

// x [X, N, in] and for each head `in` rows of the weight, from row n * stride on -> [X, N, size].
ffi::Error head_transposed(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer blocks,
                           ffi::AnyBuffer header, ffi::ResultBuffer<ffi::F32> out, std::string_view format,
                           int64_t stride) {
  Heads weight{{}, stride, 0};
  if (ffi::Error error = read_matrix(blocks, header, format, &weight.matrix); error.failure()) return error;
  const Matrix& matrix = weight.matrix;
  const int64_t tokens = x.dimensions()[0], heads = x.dimensions()[1], in = x.dimensions()[2];
  if (out->dimensions()[2] != matrix.size || !weight.hold(heads, in))
    return ffi::Error::InvalidArgument("x, the weight and its heads do not fit each other");
  if (in == 0) std::fill_n(out->typed_data(), out->element_count(), 0.0f);
  if (matrix.in_panels && !matrix.format->transposes_panels)
    return ffi::Error::InvalidArgument("panels of format " + std::string(format) + " are not read transposed");
  constexpr int64_t kStep = 16;  // tokens
  parallel_for(pool, (tokens + kStep - 1) / kStep * heads, [&](int64_t task) {
    const int64_t n = task % heads, first = task / heads * kStep, i = first * heads + n;
    const int count = static_cast<int>(std::min(tokens - first, kStep));
    matrix.format->transposed(matrix, n * stride, static_cast<int>(in),
                              {x.typed_data() + i * in, heads * in, out->typed_data() + i * matrix.size,
                               heads * matrix.size, count});
  });
  return ffi::Error::Success();
}

// The operands that all of them have.
auto weight_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Attr<std::string_view>("format");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_matmul, matmul, weight_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_head_matmul, head_matmul,
                              weight_binding().Attr<int64_t>("stride").Attr<int64_t>("first"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_head_transposed, head_transposed, weight_binding().Attr<int64_t>("stride"));

}  // namespace mla
