// The queries of each head, taken apart: what has no position, and the rest, which is rotated by it.
#include <algorithm>

#include "parallel.h"
#include "rope.h"
#include "xla/ffi/api/ffi.h"

namespace mla {

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTaskNumbers = 4 << 10;  // enough to pay for taking them

// q [B, T, N, H + P], cos and sin [B, T, P / 2] -> [B, T, N, H] and [B, T, N, P].
ffi::Error split_queries(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> cos,
                         ffi::Buffer<ffi::F32> sin, ffi::ResultBuffer<ffi::F32> plain,
                         ffi::ResultBuffer<ffi::F32> rotated) {
  const auto shape = q.dimensions(), angles = cos.dimensions();
  if (shape.size() != 4 || angles.size() != 3 || sin.element_count() != cos.element_count() || angles[0] != shape[0] ||
      angles[1] != shape[1])
    return ffi::Error::InvalidArgument("angles do not fit the queries");
  const int64_t tokens = shape[0] * shape[1], heads = shape[2], pairs = angles[2], rope = 2 * pairs;
  const int64_t width = shape[3], size = width - rope;
  if (size < 0 || static_cast<int64_t>(plain->element_count()) != tokens * heads * size ||
      static_cast<int64_t>(rotated->element_count()) != tokens * heads * rope)
    return ffi::Error::InvalidArgument("the parts do not fit the queries");
  parallel_ranges(pool, tokens, step_of(kTaskNumbers, heads * width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t n = i * heads; n < (i + 1) * heads; ++n) {
        const float* query = q.typed_data() + n * width;
        std::copy_n(query, size, plain->typed_data() + n * size);
        rotate_pairs(query + size, cos.typed_data() + i * pairs, sin.typed_data() + i * pairs, pairs,
                     rotated->typed_data() + n * rope);
      }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_split_queries, split_queries,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace mla
