// The norm before every product: one call where XLA has several.
#include "kernels.h"
#include "parallel.h"

namespace mla {

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTaskNumbers = 16 << 10;  // enough to pay for taking them

// x [..., size] over the root of its mean square, times weight [size].
ffi::Error rms_norm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                    ffi::ResultBuffer<ffi::F32> out, float epsilon) {
  const int64_t size = weight.element_count(), rows = size == 0 ? 0 : out->element_count() / size;
  if (x.dimensions().back() != size) return ffi::Error::InvalidArgument("x does not fit the weight");
  parallel_ranges(pool, rows, step_of(kTaskNumbers, size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      kernels().normalise(x.typed_data() + row * size, weight.typed_data(), size, epsilon,
                          out->typed_data() + row * size);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_rms_norm, rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("epsilon"));

}  // namespace mla
